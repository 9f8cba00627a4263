"""Settings of `identify`: what is refused in a sentence, and defaults that follow method and device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from longrun.errors import InputError, LongrunError
from longrun.patterns.identify_settings import IdentifySettings

SETTINGS = IdentifySettings("m", "o", context=512, device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "guess"}, "method 'guess' is unknown: use gates or reconstruction"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"device": "cuda"}, "torch finds no GPU"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"context": 100}, "context 100 is too small: it must be at least 128"),
        ({"steps": 0}, "steps 0 is too small"),
        ({"min_context": 600}, "min_context 600 is longer than context 512"),
        ({"learning_rate": 0.0}, "learning rate 0.0 is outside the range: give a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(SETTINGS, **changes).resolved(cuda_available=False)
    assert words in str(caught.value)


def test_defaults_follow_method_and_device() -> None:
    bare = IdentifySettings("m", "o")
    on_cpu, on_gpu = bare.resolved(False), bare.resolved(True)
    assert (on_cpu.device, on_cpu.dtype, on_cpu.context, on_cpu.steps) == ("cpu", "float32", 1024, 80)
    assert (on_gpu.device, on_gpu.dtype, on_gpu.context, on_gpu.steps) == ("cuda", "bfloat16", 32768, 400)
    assert replace(bare, context=256).resolved(False).min_context == 256
    assert on_cpu.learning_rate == on_gpu.learning_rate == 0.02
    assert replace(bare, steps=10).resolved(False).learning_rate == pytest.approx(0.16)


@pytest.mark.parametrize(
    "given",
    [
        {"steps": "5"}, {"context": 1e5}, {"context": 10**20}, {"seed": -1}, {"seed": True}, {"num_keys": 0},
        {"learning_rate": math.nan}, {"learning_rate": "x"}, {"regularization": -1}, {"out": ""}, {"model_dir": 3},
        {"adapter": "a\0b"}, {"text_files": ("n" * 300,)}, {"sink_size": 1.5}, {"method": 3}, {"device": "tpu"},
    ],
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_one_sentence(given) -> None:
    with pytest.raises(LongrunError) as error:
        IdentifySettings(**{"model_dir": "m", "out": "o", **given}).resolved(False)
    assert len(str(error.value)) < 400
