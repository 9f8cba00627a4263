"""The process that makes a training run's samples: it ends when it is told to, and then holds nothing."""

from __future__ import annotations

import os
import select

import pytest

from scripts.training.long_batches import BatchMaker


def ends(reading: int) -> bool:
    """Whether nothing holds the pipe's other end."""
    return bool(select.select([reading], [], [], 10)[0]) and os.read(reading, 1) == b""


@pytest.mark.parametrize("told", [True, False], ids=["closed", "forgotten"])
def test_a_process_ends_though_another_forked_after_it_holds_its_pipe(told):
    reading, writing = os.pipe()
    first = BatchMaker(lambda step: [step])
    assert first.take(3, order_next=True) == [3]
    os.close(writing)
    second = BatchMaker(lambda step: [-step])
    if told:
        first.close()
        first.close()
    else:
        del first
    assert ends(reading)
    assert second.take(2, order_next=False) == [-2]
    second.close()


def test_what_it_raises_is_raised_here_and_a_dead_process_is_named():
    def make(step):
        if step == 1:
            raise ValueError("no sample")
        os._exit(7)

    maker = BatchMaker(make)
    with pytest.raises(ValueError, match="no sample"):
        maker.take(1, order_next=False)
    with pytest.raises(RuntimeError, match="ended, status 7"):
        maker.take(2, order_next=False)
    maker.close()
