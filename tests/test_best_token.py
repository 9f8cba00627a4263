"""The likeliest token's way from logits to the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrun.attention.decode_state import DecodeState
from longrun.cache.dual import TokenPlace
from longrun.engine.best_token import BestToken
from longrun.errors import CheckpointError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def found(logits, device="cpu"):
    words = torch.full((2,), -1, dtype=torch.int64, device=device)
    BestToken(words).find(torch.as_tensor(logits, dtype=torch.float32, device=device))
    return BestToken(words.cpu()).read()


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_first_of_the_largest(device):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 97, 32_000, 128_256):
        logits = torch.randint(-40, 40, (size,), generator=generator).float()
        best = next(place for place, logit in enumerate(logits.tolist()) if logit == logits.max())
        assert found(logits, device) == best
        logits[size // 2] = 1e30
        assert found(logits, device) == size // 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_an_error(bad, device):
    logits = torch.full((500,), -torch.inf)
    logits[123] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        found(logits, device)


def test_finding_is_one_operation_and_changes_nothing_else():
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names, memory, logits = [], torch.full((4,), 7, dtype=torch.int64), torch.tensor([0.5, 2.5, 1.0])
    best = BestToken(memory[1:3])
    with Operations():
        best.find(logits)
    assert names == ["aten::max.dim_max"]
    assert memory[[0, 3]].tolist() == [7, 7] and best.read() == 1
    assert memory.view(torch.float32)[4] == 2.5


def test_what_a_step_found_stays_until_the_host_gives_another_token():
    state = DecodeState(head_dim=4, device=torch.device("cpu"))
    angles = torch.arange(4, dtype=torch.float32).numpy()

    def fill(token_id, slots):
        place = TokenPlace(*slots, sink_tokens=64, tail_tokens=5, tail_start=128, ring_tokens=7)
        state.fill(token_id, place, angles, angles + 4)
        assert state.lengths.tolist() == [64, 5, 128] and state.ring_len.tolist() == [7]
        assert state.slots.tolist() == list(slots) and state.sin.tolist() == [4, 5, 6, 7]

    fill(2**17, (1, 2))
    assert state.token_id.tolist() == [2**17]
    BestToken(state.best).find(torch.tensor([0.0, 1.0, 3.0]))
    fill(None, (3, 4))
    assert state.token_id.tolist() == [2] and BestToken(state.best).read() == 2
    fill(0, (5, 6))
    assert state.token_id.tolist() == [0]
