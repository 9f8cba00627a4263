"""What a row of a quality comparison says: which heads keep what, in which formats, what is evicted; and may say."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields

from longrun.arguments import choice, integer
from longrun.errors import InputError, quoted
from longrun.lab.eviction_attention import TOVA
from longrun.lab.quality.formats import SIMULATED_FORMATS, SimulatedFormat, is_simulated, simulated_format
from longrun.lab.retention_rules import RULE_NAMES
from longrun.quant.kv_format import DEFAULT_KV_FORMAT, KV_FORMATS, QUANTIZED_KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import PREFILL_MODES, SPARSE, PrefillSpec, parse_dense_tokens
from longrun.specs.selection_spec import DEFAULT_NEWEST, share_of_pages
from longrun.units import parse_bytes

SYSTEM = "system"  # a row's keep, see `RowFields`
SPARSE_FIELDS = {
    "prefill_mass": "mass", "prefill_dense": "dense_tokens", "prefill_end": "dense_end", "prefill_least": "least",
    "prefill_cap": "cap", "prefill_rows": "rows", "prefill_correct": "correct",
}  # fmt: skip
"""A row's fields that say how documents are read sparsely, as `PrefillSpec` names them."""
_METHODS = (TOVA, *RULE_NAMES)
_EVICTION = re.compile(rf"({'|'.join(_METHODS)}):(\d+(?:\.\d+)?)(%?)(@document)?".replace("SEED", r"\d{1,9}"))
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
class RowFields:
    """What a row says.

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
            self._check_type(field.name)
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
        if self.has_window and kind == "full":
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

    def _check_type(self, name: str) -> None:
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value is default:
            return
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and _TYPES[name] is not bool):
            raise InputError(f"row {self.name}: {name} is {quoted(value)}, which is of the wrong type")

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
        given = [name for name in SPARSE_FIELDS if getattr(self, name) not in (None, False)]
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
            if self.has_window:
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
        named = {name: getattr(self, field) for field, name in SPARSE_FIELDS.items()}
        if self.prefill_dense is not None:
            named["dense_tokens"] = parse_dense_tokens(self.prefill_dense)
        return PrefillSpec(**{name: value for name, value in named.items() if value is not None})

    @property
    def reaches_by_share(self) -> bool:
        """It has a kv_share that becomes reaches."""
        named = self.head_map.partition(":")[0] in ("streaming", "random", "inverted")
        return self.kv_share is not None and not named and self.recent_size is None

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
    def has_window(self) -> bool:
        """It names a window of its own."""
        return (self.sink_size, self.recent_size) != (None, None)
