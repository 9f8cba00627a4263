"""longrun runs uninstalled, editable and installed, from the repository root and from elsewhere, and works with
the library named `kernels` that transformers imports. No network; every program runs in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("longrun", "kernels", "quant", "patterns")
LINKED = ("kernels", "quant", "patterns")
# Where the dependencies are. Programs below run without `site` (-S), which hides every .pth file and with it an
# editable longrun that the environment may hold; they see what PYTHONPATH names, and nothing else.
DEPENDENCIES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def python(*args: str, cwd: Path, paths: tuple[Path, ...] = ()) -> str:
    """stdout of a Python process in `cwd` that finds packages in `paths` and then the dependencies."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *DEPENDENCIES])
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-S", *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args, "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building writes next to the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    adapter = copy / "longrun" / "model" / "adapters" / "made-up"  # packaged like one that ships
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def reference_plan(model: Path) -> str:
    """The plan as the repository root gives it, uninstalled."""
    return plan(model, ROOT)


def plan(model: Path, cwd: Path, *paths: Path) -> str:
    """JSON of a plan by a budget that the package ships."""
    args = ("--model", str(model), "--ctx", "8K", "--budget", "rtx4090-24g", "--json")
    return python("-m", "longrun.plan", *args, cwd=cwd, paths=paths)


def packaged_files(source: Path) -> set[str]:
    """Every file of the four folders by its name in a wheel."""
    found = set()
    for folder in FOLDERS:
        for path in (source / folder).rglob("*"):
            parts = path.relative_to(source).parts
            through_link = parts[0] == "longrun" and parts[1] in LINKED
            if path.is_file() and not through_link and "__pycache__" not in parts:
                found.add("/".join(parts if parts[0] == "longrun" else ("longrun", *parts)))
    return found


LOCATIONS = """
import json, longrun, longrun.kernels.page_view as ours, longrun.quant.kv_format
from longrun.kernels.cpu_library import source_of
assert all(source_of(name).is_file() for name in ("cpu_linear", "cpu_pages", "cpu_rope_store"))
print(json.dumps([longrun.__file__, ours.__file__, longrun.quant.kv_format.__file__]))
"""


def test_uninstalled_from_the_repository_root(model: Path, reference_plan: str) -> None:
    assert json.loads(reference_plan)["fits"] is True
    where = json.loads(python("-c", LOCATIONS, cwd=ROOT))
    assert [Path(path).resolve() for path in where] == [
        ROOT / "longrun" / "__init__.py",
        ROOT / "kernels" / "page_view.py",
        ROOT / "quant" / "kv_format.py",
    ]
    assert "--head-map" in python("-m", "longrun.chat", "--help", cwd=ROOT)


def test_uninstalled_from_elsewhere(model: Path, elsewhere: Path, reference_plan: str) -> None:
    assert plan(model, elsewhere, ROOT) == reference_plan
    assert "show" in python("-m", "longrun.patterns", "--help", cwd=elsewhere, paths=(ROOT,))


def test_wheel_holds_every_file_and_no_other_top_level_name(source: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = packaged_files(source)
    assert {
        "longrun/plan/budgets/a100-80g.toml",
        "longrun/kernels/cpu_gguf.cpp",
        "longrun/kernels/cpu_linear.cpp",
        "longrun/kernels/cpu_pages.cpp",
        "longrun/kernels/cpu_rope_store.cpp",
        "longrun/quant/page_codec.py",
    } <= expected
    assert "longrun/model/adapters/made-up/adapter_model.safetensors" in expected
    assert names - info == expected
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_installed_from_the_wheel(
    wheel: Path, model: Path, elsewhere: Path, reference_plan: str, tmp_path: Path
) -> None:
    pip("install", str(wheel), "--target", str(tmp_path))
    assert not (tmp_path / "kernels").exists()
    assert plan(model, elsewhere, tmp_path) == reference_plan
    for path in json.loads(python("-c", LOCATIONS, cwd=elsewhere, paths=(tmp_path,))):
        assert Path(path).is_relative_to(tmp_path / "longrun")


# What the editable install adds (a path or a finder) goes to the front: a longrun may stand among the dependencies.
EDITABLE = """
import runpy, site, sys
folder, *sys.argv = sys.argv[1:]
sys.path.insert(0, folder)  # its finder has the same name as that of a longrun installed beside the dependencies
before = list(sys.path), list(sys.meta_path)
site.addsitedir(folder)
for now, old in zip((sys.path, sys.meta_path), before):
    now[:] = [entry for entry in now if entry not in old] + old
import longrun
print(longrun.__file__)
runpy.run_module("longrun.plan", run_name="__main__")
"""


def test_editable(source: Path, model: Path, elsewhere: Path, reference_plan: str, tmp_path: Path) -> None:
    pip("install", "--editable", str(source), "--no-build-isolation", "--ignore-installed", "--prefix", str(tmp_path))
    (installed,) = (path.parent for path in tmp_path.rglob("longrun-*.dist-info"))
    args = ("plan", "--model", str(model), "--ctx", "8K", "--budget", "rtx4090-24g", "--json")
    where, _, found = python("-c", EDITABLE, str(installed), *args, cwd=elsewhere).partition("\n")
    assert Path(where).resolve() == (source / "longrun" / "__init__.py").resolve()
    assert found == reference_plan


def test_declared_commands_and_version_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"from {entry.replace(':', ' import ')}" for entry in project["scripts"].values()]
    assert lines
    shown = python("-c", "\n".join([*lines, "import longrun; print(longrun.__version__)"]), cwd=ROOT)
    assert shown.strip() == project["version"]


def transformers_source(name: str) -> str:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kernels_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a regular package `kernels`: the names that transformers imports from it, in a version it takes."""
    names = set()
    for node in ast.walk(ast.parse(transformers_source("integrations/hub_kernels.py"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kernels" and node.level == 0:
            names |= {alias.name for alias in node.names}
    assert "Mode" in names
    assert "use_kernel_forward_from_hub" in names
    lines = ["IMITATION = True"]
    for name in sorted(names):
        if name == "Mode":
            lines.append("class Mode:\n    INFERENCE = 1\n    TRAINING = 2")
        elif name[0].isupper():
            lines.append(f"class {name}:\n    def __init__(self, *args, **settings): pass")
        else:
            lines.append(f"def {name}(*args, **settings): return lambda decorated: decorated")
    least = re.search(r'KERNELS_MIN_VERSION = "([\d.]+)"', transformers_source("utils/import_utils.py"))
    assert least is not None
    folder = tmp_path_factory.mktemp("library")
    info = folder / f"kernels-{least[1]}.dist-info"
    for path in (folder / "kernels", info):
        path.mkdir()
    (folder / "kernels" / "__init__.py").write_text("\n".join(lines) + "\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {least[1]}\n")
    return folder


WITH_TRANSFORMERS = """
import json
import longrun.kernels.page_view as ours, longrun.config.model_config, transformers
from transformers import LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
facts = {"available": is_kernels_available(), "ours": ours.__file__}
if is_kernels_available():
    import kernels
    facts["imitation"] = getattr(kernels, "IMITATION", False)
    facts["same"] = hub_kernels.Mode is kernels.Mode
print(json.dumps(facts))
"""


def test_with_the_library_named_kernels_in_the_repository_root(kernels_library: Path) -> None:
    facts = json.loads(python("-c", WITH_TRANSFORMERS, cwd=ROOT, paths=(kernels_library,)))
    assert Path(facts.pop("ours")).resolve() == ROOT / "kernels" / "page_view.py"
    assert facts == {"available": True, "imitation": True, "same": True}


def test_without_that_library_in_the_repository_root() -> None:
    """The folder kernels/ must not pass for the library: transformers would then import names it does not have."""
    try:
        installed = bool(version("kernels"))
    except PackageNotFoundError:
        installed = False
    facts = json.loads(python("-c", WITH_TRANSFORMERS, cwd=ROOT))
    assert Path(facts["ours"]).resolve() == ROOT / "kernels" / "page_view.py"
    assert facts["available"] is installed


def test_a_regular_package_kernels_in_the_root_would_be_noticed(kernels_library: Path, tmp_path: Path) -> None:
    """What the tests above guard against: one `__init__.py` in kernels/ hides the library from transformers."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = "import kernels; print(hasattr(kernels, 'IMITATION'))"
    assert python("-c", code, cwd=tmp_path, paths=(kernels_library,)).strip() == "False"
    (tmp_path / "kernels" / "__init__.py").unlink()
    assert python("-c", code, cwd=tmp_path, paths=(kernels_library,)).strip() == "True"
