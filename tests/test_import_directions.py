"""The check of import directions finds what is wrong: made-up sources among the real ones."""

from __future__ import annotations

import pytest
from import_directions import direction_violations, heavy_chains, project_sources

# (module, source, what must be said).
MADE_UP = [
    ("longrun.cache.made_up", "from longrun.session.session import Session", "may not import longrun.session.session"),
    ("longrun.cache.made_up", "def f():\n    import longrun.runtime.runtime", "may not import longrun.runtime.runtime"),
    ("longrun.model.made_up", "from longrun.cache.dual import DualCache", "may not import longrun.cache.dual"),
    ("longrun.model.made_up", "from longrun.attention import torch_backend", "may not import longrun.attention.t"),
    ("longrun.kernels.made_up", "from ..cache.pool import PagePool", "may not import longrun.cache.pool"),
    (
        "longrun.quant.made_up",
        "if TYPE_CHECKING:\n    from longrun.kernels import cpu_pages",
        "import longrun.k",
    ),
    ("longrun.patterns.head_split", "import numpy", "may not import the package numpy"),
    ("longrun.runtime.runtime", "import kernels.page_view", "may not import the package kernels"),
    ("longrun.chat.made_up", "from longrun import load", "may not import longrun of room 'package'"),
    ("longrun.unheard_of", "", "has no room"),
    ("longrun.cache.made_up", "importlib.import_module('longrun.' + 'chat')", "computed name"),
]


@pytest.mark.parametrize(("module", "source", "message"), MADE_UP)
def test_the_checker_finds_a_made_up_violation(module: str, source: str, message: str) -> None:
    sources = {**project_sources(), module: source}
    known = direction_violations(project_sources())
    new = [text for text in direction_violations(sources) if text not in known]
    assert len(new) == 1
    assert message in new[0]
    assert new[0].startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longrun.plan.made_up", "import torch"),
        ("longrun.plan.made_up", "def later():\n    from torch import Tensor"),
        ("longrun.plan.made_up", "from longrun.quant.page_codec import exact_dtype"),
        ("longrun.specs", "from longrun.cache.dual import DualCache"),
        ("longrun.errors", "import longrun.engine.sampling"),
    ],
)
def test_the_checker_finds_a_made_up_way_to_torch(module: str, source: str) -> None:
    assert heavy_chains({**project_sources(), module: source})


def test_imports_for_a_type_checker_are_no_way_to_torch() -> None:
    sources = {**project_sources(), "longrun.plan.made_up": "if TYPE_CHECKING:\n    import torch"}
    assert heavy_chains(sources) == []
