"""Kernels in Triton's Gluon without a GPU: their own Python, program by program, over torch tensors.

Triton has no interpreter for Gluon. What is asynchronous on a GPU happens here as late as it may, or with
`Emulated(eager=True)` a copy at once: products read their operands when they are waited for, places are NaN until
somebody waits for their copy, and a copy of the wrong size, a wait that would last for ever, a result that is used
before it is there and an operand without its fence are errors. Warps are not told apart, so that a missing barrier
between them goes unnoticed.
"""

from types import FunctionType, SimpleNamespace

import torch
from triton.experimental.gluon._runtime import GluonJITFunction


class Pointer:
    """Into the memory of a tensor; arithmetic as on a GPU, in elements."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset

    def __add__(self, other):
        return Pointer(self.memory, self.offset + other)

    @staticmethod
    def of(x):
        """To the first element of a tensor, with everything behind it in its memory."""
        room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
        return Pointer(x.as_strided((room,), (1,)), torch.tensor(0))


class Pages:
    """A tensor descriptor."""

    def __init__(self, described):
        x, (rows, dim) = described.base, described.shape
        self.rows, self.layout, self.dtype = x.as_strided((rows, dim), described.strides), described.layout, x.dtype
        self.shape = tuple(described.block_shape)
        self.block_type = SimpleNamespace(nbytes=self.shape[0] * self.shape[1] * x.itemsize)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data, fenced, transposed=False):
        self.data, self.fenced, self.transposed = data, fenced, transposed

    def index(self, at):
        return Shared(self.data[int(at)], self.fenced, self.transposed)

    def permute(self, order):
        assert tuple(order) == (1, 0)
        return Shared(self.data, self.fenced, not self.transposed)

    def store(self, value):
        self.data.copy_(value)
        self.fenced[0] = False

    def read(self):
        assert self.fenced[0], "a product reads what was stored without a fence"
        return (self.data.T if self.transposed else self.data).float().clone()


class Barrier:
    def __init__(self):
        self.phase, self.expected, self.copies = 0, 0, []


class Barriers:
    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, at):
        return self.all[int(at)]


class Product:
    """An accumulator whose value is there once somebody has waited for it."""

    def __init__(self, value=None):
        self.value = value


class Emulated:
    """The kernel in place of a compiled one: `emulated[grid](...)`.

    Args:
        kernel: a `gluon.jit` function of a module whose names are those of `longrun.kernels.tile_attend_hopper`.
        eager: copies arrive when they are issued.
    """

    def __init__(self, kernel, eager=False):
        self.eager = eager
        self.pending = []
        modules = {
            "gl": SimpleNamespace(
                int8=torch.int8, int32=torch.int32, int64=torch.int64, float32=torch.float32, num_warps=lambda: 8,
                **dict.fromkeys(
                    ("BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"), lambda *args: None
                ),
                program_id=lambda axis: torch.tensor(self.place[axis], dtype=torch.int32),
                arange=lambda start, stop, layout: torch.arange(start, stop, dtype=torch.int32),
                zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
                full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
                sum=lambda x, axis: x.sum(axis, dtype=x.dtype), min=lambda x, axis: x.amin(axis),
                minimum=self._minimum, maximum=lambda a, b: torch.maximum(*map(torch.as_tensor, (a, b))),
                where=torch.where, exp2=torch.exp2, log2=torch.log2, static_range=range,
                convert_layout=lambda x, layout: x, load=self._load, store=self._store,
                allocate_shared_memory=self._allocate,
            ),
            "hopper": SimpleNamespace(
                fence_async_shared=self._fence, warpgroup_mma=self._mma, warpgroup_mma_wait=self._mma_wait,
                warpgroup_mma_init=Product,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=self._init, expect=self._expect, wait=self._wait
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "_barrier": lambda: None,
        }  # fmt: skip
        space = {**kernel.fn.__globals__, **modules}
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, GluonJITFunction):
                space[name] = FunctionType(value.fn.__code__, space)
        self.run = FunctionType(kernel.fn.__code__, space)

    def __getitem__(self, grid):
        def launch(*args, num_warps, **constants):
            args = [self._argument(x) for x in args]
            for place in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
                self.place, self.memory, self.fences = place, [], []
                self.run(*args, **constants)
                assert not self.pending, "a program ends while products are computed"
                assert all(not bar.copies for bars in self.memory for bar in bars.all), "or while pages are copied"

        return launch

    @staticmethod
    def _argument(x):
        if isinstance(x, torch.Tensor):
            return Pointer.of(x)
        return Pages(x) if hasattr(x, "block_shape") else x

    @staticmethod
    def _minimum(a, b):
        return torch.minimum(*map(torch.as_tensor, (a, b)))

    @staticmethod
    def _load(at, mask=None, other=None):
        if mask is None:
            return at.memory[at.offset]
        return torch.where(mask, at.memory[torch.where(mask, at.offset, 0)], other)

    @staticmethod
    def _store(at, value, mask=None):
        mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask.expand(value.shape)
        at.memory[at.offset.expand(value.shape)[mask]] = value[mask]

    def _allocate(self, dtype, shape, layout):
        if layout == "barriers":
            self.memory.append(Barriers(shape[0]))
            return self.memory[-1]
        self.fences.append([True])
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.fences[-1])

    def _fence(self):
        for fence in self.fences:
            fence[0] = True

    def _init(self, bar, count):
        assert count == 1 and not bar.copies

    def _expect(self, bar, nbytes, pred):
        bar.expected += nbytes if pred else 0

    def _copy(self, pages, place, bar, to, pred):
        if not pred:
            return
        row = int(place[0])
        assert 0 <= row <= len(pages.rows) - pages.shape[0] and place[1] == 0, row
        found = pages.rows[row : row + pages.shape[0]]
        to.data.copy_(found if self.eager else torch.full_like(found, float("nan")))
        bar.copies.append((to, found, pages.block_type.nbytes))

    def _wait(self, bar, phase):
        if bar.phase & 1 != phase:
            return
        assert bar.copies, "nothing is on its way that could end this wait"
        assert bar.expected == sum(nbytes for _, _, nbytes in bar.copies), bar.expected
        for to, found, _ in bar.copies:
            to.data.copy_(found)
        bar.phase, bar.expected, bar.copies = bar.phase + 1, 0, []

    def _mma(self, a, b, acc, *, use_acc=True, is_async=False):
        result = Product()
        a = a if isinstance(a, Shared) else a.clone()

        def compute():
            left = a.read() if isinstance(a, Shared) else a.float()
            before = acc.value if isinstance(acc, Product) else acc
            assert before is not None
            result.value = left @ b.read() + (before if use_acc else 0)

        self.pending.append(compute)
        assert is_async
        return result

    def _mma_wait(self, outstanding, deps):
        while len(self.pending) > outstanding:
            self.pending.pop(0)()
        assert all(x.value is not None for x in deps), "used before it is complete"
        return deps[0].value if len(deps) == 1 else tuple(x.value for x in deps)
