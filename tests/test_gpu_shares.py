"""Every hot path keeps its share of what the GPU can do: `pytest -m gpu`. Collected only where there is one.

A share below its floor is a defect of ours until a run side by side on one machine shows otherwise.
"""

import pytest
import torch

from scripts.bench import bench_shares

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("share", bench_shares.SHARES, ids=lambda share: share.name)
def test_a_share_of_the_ceiling_is_kept(share):
    row = share.row()
    bench_shares.release(torch.device("cuda"))
    print(row)
    assert row["sound"], row
