"""The kernel benchmarks without a GPU: everything but the timing, in small shapes, through Triton's interpreter.

What they make on the GPU is made on the CPU. How the interpreted tests run: interpreted.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from interpreted import INTERPRETED, interpreted_tests, not_interpreted
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="Triton is optional without a GPU")


class CpuForCuda(TorchFunctionMode):
    """What is asked for on the GPU stands on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


def once(*works, captured=True, prepare=None, **more):
    """The first and the last of the works, once, and a time that no GPU needed."""
    from scripts.bench.gpu_timer import Times

    if prepare is not None:
        prepare()
    for work in dict.fromkeys((works[0], works[-1])):
        work()
    return Times(1e-3, 1e-3, 1e-3)


if INTERPRETED:
    from longrun.kernels import (
        hot_pages,
        page_choose,
        page_decode,
        page_score,
        page_view,
        tile_attention,
        vector_linear,
    )
    from scripts.bench import (
        bench_fused_kernels,
        bench_hot_pages,
        bench_kernels,
        bench_page_kernels,
        bench_select,
        bench_streaming_kernels,
        bench_tiles,
        bench_vector_linear,
        kernel_rows,
    )

    @pytest.fixture(autouse=True)
    def small(monkeypatch):
        modules = (
            bench_fused_kernels, bench_hot_pages, bench_kernels, bench_page_kernels, bench_select,
            bench_streaming_kernels, bench_tiles, bench_vector_linear,
        )  # fmt: skip
        for module in modules:
            monkeypatch.setattr(module, "gpu_times", once)
        ceilings = {
            "memory_tb_s": 3.0, "host_to_device_gb_s": 50.0, "device_to_host_gb_s": 50.0, "matmul_tflops": 600.0,
        }  # fmt: skip
        monkeypatch.setattr(kernel_rows, "measure_ceilings", lambda device, *kinds: ceilings)
        with CpuForCuda():
            yield

    def test_interpreted_page_decode(monkeypatch):
        """By the reference in both kernels' places: interpreted they take a minute, and have tests of their own."""

        def decode(q, view, exact, *, workspace, out, lse):
            page_view.decode_attention(q, view, exact, out=out, lse=lse)

        made = SimpleNamespace(default_splits=lambda heads: 2, decode_attention=decode)
        monkeypatch.setattr(bench_kernels, "CudaPageDecode", lambda head_dim, kv_format: made)
        monkeypatch.setattr(page_decode, "decode_attention", decode)
        rows = list(bench_kernels.measure((256,), pool_bytes=1))
        assert len(rows) == 2 * 3 * 2 and {row["ceiling"] for row in rows} == {"copy"}
        assert rows[0]["bytes"] == 4 * 4 * (8448 + 512)

    def test_interpreted_page_kernels(monkeypatch):
        """Of this seed all bytes are the reference's: the interpreter rounds twice in a fused multiply-add."""
        monkeypatch.setattr(bench_page_kernels, "HEADS", 2)
        rows = list(bench_page_kernels.measure((128,)))
        assert [row["kernel"] for row in rows] == 2 * ["page_store", "page_dequantize", "page_digest"]

    def test_interpreted_fused_kernels(monkeypatch):
        monkeypatch.setattr(bench_fused_kernels, "LAYERS", 2)
        monkeypatch.setattr(bench_fused_kernels, "PROGRAMS", (1, 4))
        monkeypatch.setattr(bench_fused_kernels, "WIDTH", 96)
        monkeypatch.setattr(bench_fused_kernels, "BF16_LIMIT", 8e-3)  # the interpreter cuts off where others round
        rows = list(bench_fused_kernels.measure(tokens=8, merged_rows=64, pool_gib=3e-4))
        assert [row["kernel"] for row in rows] == [
            *["rope_store"] * 3, "rotary_", "silu_mul_", "merge_partial_", "merge_into", "copy_pages device",
            *["fetch_pages"] * 2, *["copy_pages to host"] * 2, *["fetch_pages of nothing"] * 2,
        ]  # fmt: skip
        assert rows[-1]["fraction_of_ceiling"] == 0 and rows[-1]["details"]["settings"] == {"num_programs": 4}

    def test_interpreted_vector_linear(monkeypatch):
        small = {name: (256, 128, *rest) for name, (_, _, *rest) in bench_vector_linear.MATRICES.items()}
        monkeypatch.setattr(bench_vector_linear, "MATRICES", small)
        for module in (bench_vector_linear, vector_linear):  # few programs, which the interpreter runs in turn
            monkeypatch.setattr(module, "default_tuning", lambda *shape: vector_linear.Tuning(128, 128, 4, 1))
        monkeypatch.setattr(bench_vector_linear, "SWEEP", {"bf16": ((64, 128, 4, 1),)})
        monkeypatch.setattr(bench_vector_linear, "LIMIT", 2e-2)  # as above
        rows = list(bench_vector_linear.measure(["bf16"], layers=2, sweep=True))
        labels = [(row["kernel"], row["details"]["matrix"]) for row in rows]
        assert labels[:2] == [("vector_linear", "qkv"), ("vector_linear sweep", "qkv")]
        assert labels[8:11] == [(name, "all") for name in ("vector_linear", "vector_linear best", "cublas")]
        assert labels[11:] == [("cublas", matrix) for matrix in small]
        assert rows[8]["bytes"] == 2 * sum(row["bytes"] for row in rows[:8:2])
        matrices = [bench_vector_linear.Matrix("int8", name, 2) for name in small]
        dense, by_torch = bench_vector_linear.measure_dense("int8", matrices)
        assert (dense["kernel"], by_torch["kernel"]) == ("dense", "dense, torch")
        assert dense["bytes"] == 2 * sum(m.bytes + 2 * 256 * 128 for m in matrices)

    def test_interpreted_select(monkeypatch):
        """By the references, which tests of their own compare with the kernels."""

        def choose(scores, view, *, workspace, **into):
            page_choose.choose_pages(scores, view, **into)

        made = SimpleNamespace(score_pages=page_score.score_pages, choose_pages=choose)
        monkeypatch.setattr(bench_select, "CudaPageSelect", lambda fmt: made)
        monkeypatch.setattr(bench_select, "PAGES", 7)
        rows = list(bench_select.measure((640, 1280), digest_bytes=1))
        assert len(rows) == 3 * (2 * 2 + 2) and rows[0]["bytes"] == 4 * 10 * 528
        assert [row["kernel"] for row in rows[-3:]] == ["score_pages", "choose_pages", "score and choose"]
        assert rows[-3]["bytes"] == 4 * 10 * 784

    def test_interpreted_hot_pages(monkeypatch):
        """By the references, which tests of their own compare with the kernels."""

        def decode(q, view, exact, *, workspace, out, lse):
            page_view.decode_attention(q, view, exact, out=out, lse=lse)

        made = SimpleNamespace(default_splits=lambda heads: 2, decode_attention=decode)
        monkeypatch.setattr(bench_hot_pages, "CudaPageDecode", lambda head_dim, kv_format: made)
        by = SimpleNamespace(hot_lookup=hot_pages.hot_lookup, hot_fetch=hot_pages.hot_fetch)
        monkeypatch.setattr(bench_hot_pages, "CudaHotPages", lambda payload, **how: by)
        for name, value in {"HEADS": 2, "PAGES": 10, "SLOTS": 40, "BLOCKS": (3,)}.items():
            monkeypatch.setattr(bench_hot_pages, name, value)
        rows = list(bench_hot_pages.measure(host_bytes=1))
        assert len(rows) == 1 + 3 * 3 + 1 and [row["bytes"] // 8448 for row in rows] == [
            20, 0, 20, 20, 20, 0, 4, 4, 0, 0, 0,
        ]  # fmt: skip
        assert rows[5]["details"]["settings"] == {"hits": "80%"}

    def test_interpreted_streaming_kernels(monkeypatch):
        """Prefill by its reference: the interpreter multiplies bfloat16 matrices as if they were integers."""
        reference = bench_streaming_kernels.banded_prefill_reference
        monkeypatch.setattr(bench_streaming_kernels, "banded_prefill", lambda *args: reference(*args[:-1]))
        rows = list(bench_streaming_kernels.measure((32,), ring_bytes=2**20))
        assert [row["kernel"] for row in rows] == [
            "banded_prefill", "torch banded_attention", "ring_decode", "torch decode",
        ]  # fmt: skip
        assert rows[0]["flops"] == 4 * 16 * 128 * 32 * 384 and rows[2]["bytes"] == 2 * 4 * 384 * 128 * 2

    def test_interpreted_tiles(monkeypatch, capsys):
        """By the references, which tests of their own compare with the kernels, and one cut of the work that fails."""

        def attend(*inputs, config=None):
            if config is not None and config.pages == 2:
                raise ValueError("out of resource")
            tile_attention.attend_tiles_reference(*inputs)

        monkeypatch.setattr(bench_tiles, "attend_tiles_", attend)
        monkeypatch.setattr(bench_tiles, "score_tiles", tile_attention.score_tiles_reference)
        monkeypatch.setattr(bench_tiles, "dequantize_pages", page_view.dequantize_pages)
        for name, value in {"HEADS": 1, "GROUP": 2, "PIECE": 64 * 50, "TUNED": bench_tiles.TUNED[::10]}.items():
            monkeypatch.setattr(bench_tiles, name, value)
        rows = list(bench_tiles.measure(64 * 120, 200, tune=True))
        assert [row["kernel"] for row in rows] == [
            "dequantize", "score_tiles", "dense attention", "choose_tiles", "attend_tiles_", "choose_tiles",
            "attend_tiles_", "attend_tiles_ tuning", *["choose_tiles", "attend_tiles_"] * 2,
        ]  # fmt: skip
        assert rows[-1]["flops"] == 2 * 2 * 30 * 4 * 128 * 64 * 128 and rows[1]["flops"] == 4 * 120 * 2 * 64 * 128
        assert rows[2]["flops"] == 4 * 2 * 200 * 128 * 120 * 64
        assert rows[-1]["details"]["of_dense_rate"] == pytest.approx(rows[-1]["flops"] / rows[2]["flops"] * 120 / 50)
        assert "ValueError: out of resource" in capsys.readouterr().out


@not_interpreted
def test_the_kernel_benchmarks_run_interpreted(warm_interpreter):
    assert interpreted_tests(warm_interpreter, __file__) == 8
