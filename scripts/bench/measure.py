"""A list of measurements within a time limit: commands in lanes that run side by side, each with a limit of its own.

    python scripts/bench/measure.py PLAN --rehearse --out /tmp/small       every command in small, before a GPU is there
    python scripts/bench/measure.py PLAN --out DIR --seconds 1500 --set model=FILE planted=DIR

A plan is a TOML file:

    [values]                          # what `${name}` means in commands; --set gives others. `${out}` is --out
    length = "120K"
    [rehearse]                        # and with --rehearse
    length = "2K"
    [[run]]
    name = "reach"                    # its log: DIR/reach.log
    lane = "real"                     # runs of a lane follow one another, lanes run side by side (default: "all")
    seconds = 240
    command = "python scripts/quality/reach_answers.py --model ${model} --length ${length} --json ${out}/reach.json"

A run that takes too long is told to end and, ten seconds later, killed; one that fails stops nothing. DIR/measured.json
says after each run how all of them ended. The same call again takes up what is not done. Status 1 unless all are.
`--gpus real=1` lets a lane see that GPU alone. Ctrl-C and SIGTERM end what runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import real
from longrun.cli import Parser, run
from longrun.errors import InputError, quoted
from longrun.files.user_files import parse_toml, read_object, read_text
from longrun.files.whole_file import write_whole
from longrun.paths import path_option

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, STOPPED, NOT_BEGUN = "done", "failed", "stopped", "not begun"
LEAST_SECONDS = 5.0
"""Left of the time; with less no run is begun."""
GRACE_SECONDS = 10.0
"""Between the signal and the kill."""
SUMMARY = "measured.json"
_ADVICE = "see the start of scripts/bench/measure.py"


@dataclass(frozen=True)
class Run:
    """One command of a plan.

    Attributes:
        name: of its log.
        command: as in a shell, without a shell's operators; `python` is this one.
        seconds: its limit.
        lane: runs of one lane follow one another.
    """

    name: str
    command: str
    seconds: float
    lane: str = "all"

    def names(self) -> list[str]:
        """Of the values that it needs."""
        return string.Template(self.command).get_identifiers()

    def argv(self, values: Mapping[str, str]) -> list[str]:
        """With values in place of their names.

        Raises:
            InputError: a name without a value, or quotes that do not end.
        """
        try:
            words = shlex.split(self.command)
            found = [string.Template(word).substitute(values) for word in words]
        except KeyError as error:
            raise InputError(f"run {self.name} needs a value: give --set {error.args[0]}=...") from error
        except ValueError as error:
            raise InputError(f"run {self.name}: its command cannot be read ({error}): {_ADVICE}") from error
        return [sys.executable if word == "python" else word for word in found]


@dataclass(frozen=True)
class Ended:
    """How a run ended: DONE, FAILED (with an exit status above 0), STOPPED at a limit, or NOT_BEGUN."""

    name: str
    how: str
    exit_status: int | None
    seconds: float


def read_plan(path: Path) -> tuple[list[Run], dict[str, str], dict[str, str]]:
    """Runs, values, and values of a rehearsal.

    Raises:
        InputError: a file that cannot be read, or is no plan.
    """
    what = f"plan {path}"
    found = parse_toml(read_text(path, InputError, _ADVICE), what, InputError)
    tables = [found.pop(name, {}) for name in ("values", "rehearse")]
    runs = found.pop("run", [])
    texts = all(isinstance(table, dict) and all(isinstance(x, str) for x in table.values()) for table in tables)
    if found or not texts or not isinstance(runs, list) or not runs:
        raise InputError(f"{what} must hold [[run]] tables, [values] and [rehearse] of texts, nothing else: {_ADVICE}")
    made: list[Run] = []
    for table in runs:
        try:
            one = Run(**table)
            wrong = not all(isinstance(x, str) for x in (one.name, one.command, one.lane)) or one.seconds <= 0
        except TypeError as error:
            raise InputError(f"{what}: a run is not as it should be ({error}): {_ADVICE}") from error
        if wrong or one.name in {other.name for other in made} or Path(one.name).name != one.name:
            raise InputError(f"{what}: run {quoted(one.name)} has a bad value, or its name is taken: {_ADVICE}")
        made.append(one)
    return made, *tables


class Measuring:
    """Runs a plan in a folder.

    Args:
        folder: gets logs and the summary.
        seconds: for all together.
        gpus: by lane, the one GPU that it sees.
    """

    def __init__(self, folder: Path, seconds: float, gpus: Mapping[str, str]) -> None:
        self._folder, self._gpus = folder, gpus
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._ended: dict[str, Ended] = {}
        self._running: set[subprocess.Popen] = set()

    def take(self, runs: Sequence[Run], values: Mapping[str, str]) -> list[Ended]:
        """Run what an earlier call has not done: all in the plan's order.

        Raises:
            InputError: as `Run.argv`, before anything is begun; the folder cannot be made; its summary is none.
        """
        commands = {one.name: one.argv(values) for one in runs}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"folder {self._folder} cannot be made ({error.strerror}): give another --out") from error
        self._ended = {name: one for name, one in self._earlier().items() if name in commands and one.how == DONE}
        todo = [one for one in runs if one.name not in self._ended]
        lanes = {one.lane: [other for other in todo if other.lane == one.lane] for one in todo}
        with ThreadPoolExecutor(max(1, len(lanes))) as pool:
            work = [pool.submit(self._lane, lane, commands) for lane in lanes.values()]
            try:
                wait(work)
            except BaseException:  # a signal: what runs is told to end, and nothing is begun
                self._end = time.monotonic()
                for process in tuple(self._running):
                    _signal(process, signal.SIGTERM)
                wait(work)
                raise
            for lane in work:
                lane.result()
        return [self._ended[one.name] for one in runs]

    def _earlier(self) -> dict[str, Ended]:
        path = self._folder / SUMMARY
        if not path.exists():
            return {}
        found = read_object(path, InputError, "remove it, or give another --out")
        try:
            return {one["name"]: Ended(**one) for one in found["runs"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is no summary of measurements: remove it, or give another --out") from error

    def _lane(self, runs: Sequence[Run], commands: Mapping[str, list[str]]) -> None:
        for one in runs:
            ended = self._run(one, commands[one.name])
            with self._lock:
                self._ended[one.name] = ended
                summary = {"runs": [asdict(found) for found in self._ended.values()]}
                write_whole(self._folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
                print(f"{ended.name}: {ended.how} after {ended.seconds:.0f} s", flush=True)

    def _run(self, one: Run, command: Sequence[str]) -> Ended:
        if self._end - time.monotonic() < LEAST_SECONDS:
            return Ended(one.name, NOT_BEGUN, None, 0.0)
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[one.lane]} if one.lane in self._gpus else {}
        began = time.monotonic()
        with open(self._folder / f"{one.name}.log", "wb") as log:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **gpu},
                )  # fmt: skip
            except OSError as error:
                log.write(f"{command[0]} cannot be started: {error.strerror}\n".encode())
                return Ended(one.name, FAILED, None, 0.0)
            self._running.add(process)
            status = _wait(process, min(one.seconds, self._end - time.monotonic()))
            self._running.remove(process)
        how = STOPPED if status is None else DONE if status == 0 else FAILED
        return Ended(one.name, how, status, time.monotonic() - began)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Exit status; None where the process and its children had to be ended."""
    for limit, then in ((seconds, signal.SIGTERM), (GRACE_SECONDS, signal.SIGKILL)):
        try:
            status = process.wait(limit)
            return status if then is signal.SIGTERM else None
        except subprocess.TimeoutExpired:
            _signal(process, then)
    process.wait()
    return None


def _signal(process: subprocess.Popen, what: signal.Signals) -> None:
    """To it and its children, unless they have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, what)


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Of NAME=VALUE.

    Raises:
        InputError: another form.
    """
    for text in texts:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise InputError(f"{option} {quoted(text)} is no NAME=VALUE")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a plan and print how it went. Status 0 where all is done, else 1."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=path_option)
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=real(1), default=1e6, help="for all runs together")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="values for the plan's commands")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="LANE=GPU", help="the one GPU that a lane sees")
    parser.add_argument("--rehearse", action="store_true", help="with the plan's values for a rehearsal")
    args = parser.parse_args(argv)
    runs, values, small = read_plan(args.plan)
    given, gpus = pairs(args.set, "--set"), pairs(args.gpus, "--gpus")
    _check_known(given, {name for one in runs for name in one.names()} - {"out"}, "--set")
    _check_known(gpus, {one.lane for one in runs}, "--gpus")
    values |= (small if args.rehearse else {}) | given | {"out": str(args.out.resolve())}
    measuring = Measuring(args.out, args.seconds, gpus)
    ended = measuring.take(runs, values)
    for one in ended:
        tail = _last_line(args.out / f"{one.name}.log") if one.how in (FAILED, STOPPED) else ""
        print(f"{one.how:9}  {one.seconds:5.0f} s  {one.name}  {tail}".rstrip())
    return 0 if all(one.how == DONE for one in ended) else 1


def _check_known(given: Iterable[str], known: Collection[str], option: str) -> None:
    """Raise InputError for a name that means nothing in the plan."""
    for name in given:
        if name not in known:
            raise InputError(f"{option} {quoted(name)} is nowhere in the plan, which has {', '.join(sorted(known))}")


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    run(main)
