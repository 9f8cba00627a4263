"""The rows of a quality comparison: which heads keep what, in which formats, and what is evicted. Read from TOML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from longrun.arguments import choice, integer
from longrun.errors import InputError, quoted
from longrun.files.user_files import parse_toml, read_text
from longrun.lab.eviction_attention import TOVA
from longrun.lab.quality import shares
from longrun.lab.quality.formats import SIMULATED_FORMATS, SimulatedFormat, is_simulated, simulated_format
from longrun.lab.retention_rules import RULE_NAMES
from longrun.patterns.baseline_maps import inverted_map, random_map, streaming_map
from longrun.patterns.head_map import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, HeadMap, HeadSplit
from longrun.quant.kv_format import DEFAULT_KV_FORMAT, KV_FORMATS, QUANTIZED_KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import PREFILL_MODES, SPARSE, PrefillSpec, parse_dense_tokens
from longrun.specs.selection_spec import DEFAULT_NEWEST, share_of_pages
from longrun.units import parse_bytes

REFERENCE = "reference"
SYSTEM = "system"  # a row's keep, see `Row`
_SPARSE_FIELDS = {
    "prefill_mass": "mass", "prefill_dense": "dense_tokens", "prefill_end": "dense_end", "prefill_least": "least",
    "prefill_cap": "cap", "prefill_rows": "rows", "prefill_correct": "correct",
}  # fmt: skip
"""A row's fields that say how documents are read sparsely, as `PrefillSpec` names them."""
_METHODS = (TOVA, *RULE_NAMES)
_EVICTION = re.compile(rf"({'|'.join(_METHODS)}):(\d+(?:\.\d+)?)(%?)(@document)?".replace("SEED", r"\d{1,9}"))


@dataclass(frozen=True)
class Eviction:
    """What a row evicts.

    Attributes:
        method: "tova" or a retention rule's name (`longrun.lab.retention_rules`).
        keep: tokens, or percent of the prompt's length where `percent` is true.
        at_document: a rule compresses at the document's end, before it knows the question; else, as in SnapKV's paper,
            at the prompt's end with the question in its window.
    """

    method: str
    keep: float
    percent: bool
    at_document: bool

    def keep_tokens(self, length: int) -> int:
        """Tokens to keep of a prompt of `length` tokens, at least 1."""
        return max(1, round(length * self.keep / 100) if self.percent else int(self.keep))


@dataclass(frozen=True)
class Row:
    """One setting to measure.

    Attributes:
        name: of the row; plots join rows of one `method`.
        head_map: "full", "streaming", "random:SEED", "inverted:FOLDER" or a head map's folder; in a settings file also
            "@NAME" for a folder that the command names (`with_maps`).
        retrieval_ratio: share of the map's KV heads that keep all tokens; None splits at score 0.5.
        kv: page format, or a simulated one (`quality.formats`); weights: weight format, None for the budget's.
        eviction: "none", "tova:KEEP" or "RULE:KEEP" with a retention rule like snapkv, KEEP in tokens or with % of the
            prompt's length; of a rule also "RULE:KEEP@document".
        sink_size, recent_size: window of the streaming heads, None for a folder's own (64 and 256 where the map comes
            from no folder).
        kv_share: instead of a ratio, the share of full attention's tokens that the heads hold at each tested length
            (`quality.shares`). A map's folder gives reaches by its losses, or, with a `recent_size`, whole heads and
            windows, as random and inverted maps do; streaming gives one window to all heads.
        kv_bytes: instead of a ratio, what `longrun.load` takes, which gives reaches: a size like "400MB", or like "25%"
            that share of the bytes planned for full attention in the same page format at each tested length.
        keep: first tokens that no head drops, or "system": those of the longest system prompt of the task "rules" at
            each tested length. Shares and bytes count them.
        select: pages of every retrieval head that a decode step reads, as `longrun.load` takes it; answers and scored
            texts are then read token by token. select_question: questions, too.
        prefill: "sparse" for documents that are read sparsely, questions and scored texts exactly; prefill_mass and the
            other fields of that beginning then are those of `PrefillSpec` (dense_tokens is prefill_dense, dense_end
            prefill_end).
        chunk_size: tokens of a prefill step, None for the comparison's. It changes rounding alone, so the reference's
            settings with another one show what numbers of this size mean.

    Raises:
        InputError: a value that is none of these, or two that exclude each other.
    """

    name: str
    head_map: str = "full"
    retrieval_ratio: float | None = None
    kv: str = DEFAULT_KV_FORMAT
    weights: str | None = None
    eviction: str = "none"
    sink_size: int | None = None
    recent_size: int | None = None
    chunk_size: int | None = None
    kv_share: float | None = None
    kv_bytes: str | None = None
    keep: int | str | None = None
    select: int | str | None = None
    select_question: bool = False
    prefill: str | None = None
    prefill_mass: float | None = None
    prefill_dense: int | str | None = None
    prefill_end: int | None = None
    prefill_least: float | None = None
    prefill_cap: float | None = None
    prefill_rows: int | None = None
    prefill_correct: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(self, field.name)
        if self.simulates is None and self.kv not in KV_FORMATS:
            nearest = difflib.get_close_matches(self.kv, (*KV_FORMATS, *SIMULATED_FORMATS), n=1, cutoff=0.0)[0]
            raise InputError(
                f"row {self.name}: kv {quoted(self.kv)} is unknown: use one of {', '.join(KV_FORMATS)} or a simulated "
                f"format like {SIMULATED_FORMATS[0]} (nearest: {nearest})"
            )
        if self.weights not in (None, *WEIGHT_FORMATS):
            raise InputError(
                f"row {self.name}: weights {quoted(self.weights)} is unknown: use one of {', '.join(WEIGHT_FORMATS)}"
            )
        kind, _, rest = self.head_map.partition(":")
        if kind == "random" and not rest.isdecimal():
            raise InputError(f"row {self.name}: {quoted(self.head_map)} has no seed: write random:0")
        self._check_sizes(kind)
        if kind == "random" and self.retrieval_ratio is None and self.kv_share is None:
            raise InputError(f"row {self.name}: a random map needs a retrieval_ratio: its scores mean nothing")
        if kind == "inverted" and not rest:
            raise InputError(f"row {self.name}: {quoted(self.head_map)} names no map: write inverted:FOLDER")
        if kind in ("full", "streaming") and self.retrieval_ratio is not None:
            raise InputError(f"row {self.name}: head_map {kind} leaves nothing to choose: leave retrieval_ratio out")
        if self._has_window and kind == "full":
            raise InputError(f"row {self.name}: head_map full has no streaming heads: leave sink_size, recent_size out")
        if self.keep is not None:
            if kind == "full":
                raise InputError(f"row {self.name}: head_map full keeps everything: leave keep out")
            if self.keep != SYSTEM and (isinstance(self.keep, str) or self.keep < 1):
                raise InputError(f"row {self.name}: keep {quoted(self.keep)} is neither system nor a number above 0")
        self._check_selection(kind)
        self._check_prefill(kind)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(f"row {self.name}: chunk_size {self.chunk_size} must be at least 1")
        if self.evicts is not None:
            if self.head_map != "full":
                raise InputError(f"row {self.name}: {self.eviction} evicts from full attention: use head_map full")
            if self.kv in QUANTIZED_KV_FORMATS or self.simulates is not None:
                raise InputError(f"row {self.name}: evicting caches hold exact tokens: use kv bf16")

    @property
    def select_from(self) -> int | None:
        """Steps of a row that selects do so at any length, also where reading all takes less time."""
        return None if self.select is None else 0

    def _check_selection(self, kind: str) -> None:
        if self.select is None:
            if self.select_question:
                raise InputError(f"row {self.name}: select_question needs pages to select: give select as well")
            return
        what = f"row {self.name}: select"
        if not isinstance(self.select, str):
            integer(self.select, what, DEFAULT_NEWEST + 1)
        elif share_of_pages(self.select, what) is None:
            raise InputError(f'{what} {quoted(self.select)} is neither a number of pages nor a share like "25%"')
        if self.kv not in QUANTIZED_KV_FORMATS:
            raise InputError(f"row {self.name}: select needs kv {' or '.join(QUANTIZED_KV_FORMATS)}, not {self.kv}")
        if kind == "streaming":
            raise InputError(f"row {self.name}: head_map streaming has no pages to select: leave select out")

    def _check_prefill(self, kind: str) -> None:
        if self.prefill is not None:
            choice(self.prefill, f"row {self.name}: prefill", PREFILL_MODES)
        given = [name for name in _SPARSE_FIELDS if getattr(self, name) not in (None, False)]
        if self.prefill != SPARSE:
            if given:
                raise InputError(f"row {self.name}: {given[0]} is for prefill {SPARSE}: give that as well")
            return
        if kind == "streaming":
            raise InputError(f"row {self.name}: head_map streaming has no pages to choose: leave prefill out")
        if self.evicts is not None or self.simulates is not None:
            raise InputError(f"row {self.name}: evicting and simulated caches read exactly: leave prefill out")
        try:
            self.sparse  # noqa: B018 - it raises
        except InputError as error:
            raise InputError(f"row {self.name}: {error}") from error

    def _check_sizes(self, kind: str) -> None:
        """Of ratio, share and bytes at most one, and one that goes with the head map and the window."""
        given = [name for name in ("retrieval_ratio", "kv_share", "kv_bytes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"row {self.name}: {' and '.join(given)} both say what heads keep: give one")
        if self.kv_share is not None:
            if not 0 < self.kv_share <= 1:
                raise InputError(f"row {self.name}: kv_share {self.kv_share:g} must be above 0 and at most 1")
            if kind == "full":
                raise InputError(f"row {self.name}: head_map full keeps everything: leave kv_share out")
            if kind == "streaming" and self.recent_size is not None:
                raise InputError(f"row {self.name}: with kv_share the window follows from it: leave recent_size out")
            if self.reaches_by_share and self.sink_size is not None:
                raise InputError(f"row {self.name}: reaches have the sinks of their losses: leave sink_size out")
        if self.kv_bytes is not None:
            if kind in ("full", "streaming", "random", "inverted"):
                raise InputError(f"row {self.name}: kv_bytes need reach losses: give the folder of a map as head_map")
            if self._has_window:
                raise InputError(f"row {self.name}: kv_bytes give reaches: leave sink_size, recent_size out")
            number, percent, rest = self.kv_bytes.partition("%")
            if not percent:
                parse_bytes(self.kv_bytes, f"row {self.name}: kv_bytes")
            elif rest or not re.fullmatch(r"\d+(\.\d+)?", number) or not 0 < float(number) <= 100:
                raise InputError(f"row {self.name}: kv_bytes {quoted(self.kv_bytes)} is no share: write 25%, or 400MB")

    @property
    def sparse(self) -> PrefillSpec | None:
        """How documents are read, where that is sparsely. Raises InputError where a value is out of its range."""
        if self.prefill != SPARSE:
            return None
        named = {name: getattr(self, field) for field, name in _SPARSE_FIELDS.items()}
        if self.prefill_dense is not None:
            named["dense_tokens"] = parse_dense_tokens(self.prefill_dense)
        return PrefillSpec(**{name: value for name, value in named.items() if value is not None})

    @property
    def read_exactly(self) -> Row:
        """The row without what it says of sparse reading."""
        return replace(self, prefill=None, **{name: Row.__dataclass_fields__[name].default for name in _SPARSE_FIELDS})

    @property
    def by_length(self) -> bool:
        """Its heads keep other tokens at every tested length."""
        return self.kv_share is not None or self.kv_bytes is not None or self.keep == SYSTEM

    @property
    def reaches_by_share(self) -> bool:
        """It has a kv_share that becomes reaches."""
        named = self.head_map.partition(":")[0] in ("streaming", "random", "inverted")
        return self.kv_share is not None and not named and self.recent_size is None

    def split_at(self, num_layers: int, num_kv_heads: int, length: int, keep: int = 0) -> HeadSplit | None:
        """The heads that `kv_share` gives at a length; None where the share does not even hold the windows.

        Args:
            keep: first tokens that all heads keep.

        Raises:
            HeadMapError: as `make_map`, or a folder without reach losses.
        """
        assert self.kv_share is not None
        head_map = self.make_map(num_layers, num_kv_heads)
        assert isinstance(head_map, HeadMap)
        head_map.check_shape(num_layers, num_kv_heads, f"row {self.name}: the head map")
        head_map = shares.with_sinks(head_map, keep)
        if self.head_map == "streaming":
            return shares.streaming_split(num_layers, num_kv_heads, self.kv_share, length, head_map.sink_size)
        if self.reaches_by_share:
            return shares.reaching_split(head_map, self.kv_share, length)
        return shares.whole_head_split(head_map, self.kv_share, length)

    def bytes_at(self, full: int) -> int:
        """What `kv_bytes` means where full attention's pages take `full` bytes."""
        assert self.kv_bytes is not None
        if self.kv_bytes.endswith("%"):
            return int(full * float(self.kv_bytes[:-1]) / 100)
        return parse_bytes(self.kv_bytes, "kv_bytes")

    @property
    def simulates(self) -> SimulatedFormat | None:
        """The simulated format asked for; InputError where it is unknown."""
        if not is_simulated(self.kv):
            return None
        try:
            return simulated_format(self.kv)
        except InputError as error:
            raise InputError(f"row {self.name}: {error}") from error

    @property
    def stored_kv(self) -> str:
        """The page format that `longrun.load` takes: simulated formats are held in bf16 pages."""
        return "bf16" if is_simulated(self.kv) else self.kv

    @property
    def evicts(self) -> Eviction | None:
        """The eviction asked for; InputError where it cannot be read."""
        if self.eviction == "none":
            return None
        found = _EVICTION.fullmatch(self.eviction)
        if found is None or (found[4] and found[1] == TOVA) or float(found[2]) <= 0:
            raise InputError(
                f"row {self.name}: eviction {quoted(self.eviction)} is unknown: use none, snapkv:512, snapkv:25%, "
                f"snapkv:512@document, tova:512 or tova:25%, or instead of snapkv one of {', '.join(RULE_NAMES[1:])}"
            )
        if not found[3] and "." in found[2]:
            raise InputError(f"row {self.name}: eviction {quoted(self.eviction)} keeps no whole number of tokens")
        return Eviction(found[1], float(found[2]), bool(found[3]), bool(found[4]))

    @property
    def method(self) -> str:
        """What the row is one point of: its line in a plot."""
        if self.evicts is not None:
            method = self.evicts.method.partition("-")  # random tokens of any seed are one method
            what = f"{method[0]} tokens" if method[1] else method[0]
            return what + (" before the question" if self.evicts.at_document else "") + self._chunks
        kind, _, rest = self.head_map.partition(":")
        what = {"full": "full", "streaming": "all streaming", "random": "random map"}.get(kind)
        if what is None:
            what = f"inverted {Path(rest).name}" if kind == "inverted" else f"map {Path(self.head_map).name}"
        if self.kv_bytes is not None or self.reaches_by_share:
            what = f"reaches {Path(self.head_map).name}"
        elif self.kv_share is not None and kind != "streaming":
            what += f", window {DEFAULT_RECENT_SIZE if self.recent_size is None else self.recent_size:,}"
        if self.keep is not None:
            what += f", keep {self.keep}"
        if self.select is not None:
            pages = self.select if isinstance(self.select, str) else f"{self.select:,}"
            what += f", select {pages}{' with questions' if self.select_question else ''}"
        if self.prefill == SPARSE:
            what += f", read sparsely{', corrected' if self.prefill_correct else ''}"
        weights = f", {self.weights} weights" if self.weights else ""
        varied = ", varied window" if self._has_window and self.kv_share is None else ""
        return f"{what}, {self.kv}{weights}{varied}{self._chunks}"

    @property
    def _chunks(self) -> str:
        return "" if self.chunk_size is None else f", chunks of {self.chunk_size:,}"

    @property
    def _has_window(self) -> bool:
        return (self.sink_size, self.recent_size) != (None, None)

    def make_map(self, num_layers: int, num_kv_heads: int) -> HeadMap | str:
        """What `longrun.load` takes as head_map.

        Raises:
            HeadMapError: the folder holds none, or an impossible window.
        """
        kind, _, rest = self.head_map.partition(":")
        window = (
            DEFAULT_SINK_SIZE if self.sink_size is None else self.sink_size,
            DEFAULT_RECENT_SIZE if self.recent_size is None else self.recent_size,
        )
        if kind == "full":
            return "full"
        if kind == "streaming":
            return streaming_map(num_layers, num_kv_heads, *window)
        if kind == "random":
            return random_map(num_layers, num_kv_heads, int(rest), *window)
        if kind == "inverted":
            return inverted_map(HeadMap.load(rest)).with_window(self.sink_size, self.recent_size)
        return HeadMap.load(self.head_map).with_window(self.sink_size, self.recent_size)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, JSON-able; of a map's folder the path as given. Without `keep`, `select`, `prefill` and what goes
        with them where they are not used, as before there were such."""
        newer = {"keep", "select", "select_question", "prefill", *_SPARSE_FIELDS}
        newer = {name for name in newer if getattr(self, name) in (None, False)}
        return {name: value for name, value in asdict(self).items() if name not in newer}


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a settings file: `[[row]]` tables with the fields of `Row`.

    Raises:
        InputError: a file that cannot be read, an unknown key, a name given twice or kept for the reference.
    """
    advice = "see scripts/quality/compare_settings.toml"
    found = parse_toml(read_text(path, InputError, advice), f"settings file {path}", InputError)
    tables = found.pop("row", None)
    if found or not isinstance(tables, list) or not tables:
        raise InputError(
            f"settings file {path} must hold [[row]] tables and nothing else: see scripts/quality/compare_settings.toml"
        )
    known, rows = {field.name for field in fields(Row)}, []
    for number, table in enumerate(tables, start=1):
        for key in table:
            if key not in known:
                raise InputError(f"{path}, row {number}: {key} is unknown: use {', '.join(sorted(known))}")
        if "name" not in table:
            raise InputError(f"{path}, row {number} has no name: every row needs one")
        row = Row(**table)
        if row.name == REFERENCE or row.name in {other.name for other in rows}:
            raise InputError(f"{path}: the name {quoted(row.name)} is taken: give every row one of its own")
        rows.append(row)
    return tuple(rows)


def with_maps(rows: Sequence[Row], folders: Mapping[str, str]) -> tuple[tuple[Row, ...], list[str]]:
    """The rows with folders in place of "@NAME", and the names of the rows left out, whose NAME has no folder.

    Raises:
        InputError: a NAME of `folders` that no row has.
    """
    kept, left_out, used = [], [], set()
    for row in rows:
        before, placeholder, name = row.head_map.rpartition("@")
        if not placeholder:
            kept.append(row)
        elif name in folders:
            used.add(name)
            kept.append(replace(row, head_map=before + folders[name]))
        else:
            left_out.append(row.name)
    if unknown := sorted(set(folders) - used):
        raise InputError(f"head map name {quoted(unknown[0])} is in no row of the settings file: see its @NAMEs")
    return tuple(kept), left_out


def chosen_rows(rows: Sequence[Row], words: Sequence[str]) -> tuple[Row, ...]:
    """The rows whose names hold one of the words, in their order; all of them without a word.

    Raises:
        InputError: a word that no name holds.
    """
    for word in words:
        if not any(word in row.name for row in rows):
            raise InputError(
                f"--rows {quoted(word)} is in no row's name: they are {', '.join(row.name for row in rows)}"
            )
    return tuple(row for row in rows if not words or any(word in row.name for word in words))


_TYPES = {
    "name": str,
    "head_map": str,
    "retrieval_ratio": (int, float),
    "kv": str,
    "weights": str,
    "eviction": str,
    "sink_size": int,
    "recent_size": int,
    "chunk_size": int,
    "kv_share": (int, float),
    "kv_bytes": str,
    "keep": (int, str),
    "select": (int, str),
    "select_question": bool,
    "prefill": str,
    "prefill_mass": (int, float),
    "prefill_dense": (int, str),
    "prefill_end": int,
    "prefill_least": (int, float),
    "prefill_cap": (int, float),
    "prefill_rows": int,
    "prefill_correct": bool,
}


def _check_type(row: Row, name: str) -> None:
    value, default = getattr(row, name), Row.__dataclass_fields__[name].default
    if value is default:
        return
    if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and _TYPES[name] is not bool):
        raise InputError(f"row {row.name}: {name} is {quoted(value)}, which is of the wrong type")


REFERENCE_ROW = Row(REFERENCE, kv="bf16")
