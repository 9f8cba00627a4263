"""Budget files: how much memory a run may use and in which formats, as TOML with every fault named.

    [memory]  gpu = "80 GB" (required), host = "100 GiB"
    [weights] format = "int4"
    [kv]      format = "k5v3", retrieval_ratio = 0.5, sink_size = 128, recent_size = 256, page_size = 64;
              kv_bytes = "8 GB" or "25%" instead of retrieval_ratio; keep = 700 or "system"
    [prefill] chunk_size = 32768, mode = "exact" or "sparse", mass = 0.95, dense_tokens = 131072
    [decode]  pages_per_head = 128, "25%" or "off", selector = "top", select_from = 0, hot_pool = "2 GB" or "off"

Everything but `[memory] gpu` may be left out; `Budget` says what it is then. `gpu` has no second name: on a CPU, too,
it is the memory of the compute device (`Budget.device_bytes`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from longrun.arguments import MAX_INTEGER, integer, number
from longrun.errors import VALUE_LIMIT, ConfigError, InputError, quoted, short_path, shortened
from longrun.files.user_files import parse_toml, read_text
from longrun.paths import user_path
from longrun.quant.kv_format import DEFAULT_KV_FORMAT, KV_FORMATS, PAGE_SIZES, QUANTIZED_KV_FORMATS
from longrun.quant.weight_format import WEIGHT_FORMATS
from longrun.specs.prefill_spec import DEFAULT_PREFILL, PREFILL_MODES, PrefillSpec
from longrun.specs.selection_spec import DEFAULT_NEWEST, DEFAULT_SELECTOR, SELECTORS, share_of_pages
from longrun.units import parse_bytes, share_of

_SECTIONS: dict[str, dict[str, str]] = {
    "memory": {"gpu": "device_bytes", "host": "host_bytes"},
    "weights": {"format": "weight_format"},
    "kv": {
        "format": "kv_format",
        "retrieval_ratio": "retrieval_ratio",
        "kv_bytes": "kv_bytes",
        "sink_size": "sink_size",
        "recent_size": "recent_size",
        "keep": "keep",
        "page_size": "page_size",
    },
    "prefill": {
        "chunk_size": "chunk_size",
        "mode": "prefill_mode",
        "share": "prefill_share",
        "mass": "prefill_mass",
        "dense_tokens": "prefill_dense",
    },
    "decode": {
        "pages_per_head": "pages_per_head",
        "selector": "selector",
        "select_from": "select_from",
        "hot_pool": "hot_pool",
    },
}
SYSTEM = "system"
"""What `keep` may say instead of a number: as many tokens as the system prompt has."""
OFF = "off"
"""What `pages_per_head` may say instead of a number: a decode step reads all pages; and `hot_pool`: there is none."""
LEAST_PAGES = DEFAULT_NEWEST + 1
"""Of `pages_per_head`: the newest ones are always read, so that fewer would leave no choice."""

_FIELD_PLACES = {field: (section, key) for section, keys in _SECTIONS.items() for key, field in keys.items()}


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Attributes:
        device_bytes: memory of the compute device; on the CPU, main memory for weights, activations and device pool.
        host_bytes: main memory for pages that the device pool does not hold. Default 0: no host pool.
        weight_format: one of `WEIGHT_FORMATS`, or None for the device's own (fp32 on the CPU, bf16 on a GPU).
        kv_format: one of `KV_FORMATS`. Default k5v3.
        retrieval_ratio: share of the KV heads kept as retrieval heads where a head map is given, in (0, 1], or None
            (default) for the heads that score at least 0.5.
        kv_bytes: instead of a ratio, the bytes that keys and values may take at the full context, or a share of what
            full attention takes there, like "25%"; how far each head reaches within them follows from the head map's
            reach losses. Default None.
        sink_size, recent_size: window of the streaming heads in tokens, or None (default) for the head map's own.
        keep: first tokens of the text that no head drops, whatever the window's sinks or its reach, or "system": as
            many as stand before a chat's first message. Default None: the sinks alone.
        page_size: tokens of a page, one of `PAGE_SIZES`. Default 64.
        chunk_size: the most tokens of one prefill step. Default 1024.
        prefill_mode: how texts are read, one of `PREFILL_MODES`. Default None: exactly.
        prefill_share, prefill_mass, prefill_dense: where texts are read sparsely, `PrefillSpec.cap`, `mass` and
            `dense_tokens`, or None (default) for those of `prefill_base`.
        pages_per_head: the most pages of a retrieval head that a decode step reads, or a share of those that the head
            holds then, like "25%" (no fewer than 64), or "off". Default None: all.
        selector: which pages these are, one of `SELECTORS`. Default "top".
        select_from: pages of a head from which on decode steps select; below so many all are read. Default None: from
            where selecting saves time (`longrun.plan.crossover`); 0: always.
        hot_pool: bytes of a GPU's memory that keep the host pages which decode steps chose lately, or "off". Default
            None: host pages are read in place.
        source: file or name that error messages and the plan show.

    Raises:
        ConfigError: a value of the wrong type or an impossible one.
    """

    device_bytes: int
    host_bytes: int = 0
    weight_format: str | None = None
    kv_format: str = DEFAULT_KV_FORMAT
    retrieval_ratio: float | None = None
    kv_bytes: int | str | None = None
    sink_size: int | None = None
    recent_size: int | None = None
    keep: int | str | None = None
    page_size: int = 64
    chunk_size: int = 1024
    prefill_mode: str | None = None
    prefill_share: float | None = None
    prefill_mass: float | None = None
    prefill_dense: int | None = None
    prefill_base: PrefillSpec = DEFAULT_PREFILL
    pages_per_head: int | str | None = None
    selector: str = DEFAULT_SELECTOR
    select_from: int | None = None
    hot_pool: int | str | None = None
    source: str = "budget"

    def __post_init__(self) -> None:
        self._check_whole("device_bytes", 1)
        self._check_whole("host_bytes", 0)
        self._check_name("kv_format", KV_FORMATS)
        if self.weight_format is not None:
            self._check_name("weight_format", WEIGHT_FORMATS)
        if self.kv_bytes is not None:
            if not isinstance(self.kv_bytes, str):
                self._check_whole("kv_bytes", 1)
            elif share_of(self.kv_bytes) is None:
                self._fail("kv_bytes", "is no share: write it like 25%")
            if self.retrieval_ratio is not None:
                raise ConfigError(
                    f"{self.source}: [kv] retrieval_ratio = {quoted(self.retrieval_ratio)} and kv_bytes = "
                    f"{self.kv_bytes} both say which heads keep all tokens: leave one out"
                )
        if self.sink_size is not None:
            self._check_whole("sink_size", 0)
        if self.recent_size is not None:
            self._check_whole("recent_size", 1)
        if self.keep is not None and self.keep != SYSTEM:
            if isinstance(self.keep, str):
                self._fail("keep", 'is no number of tokens: write one, or "system"')
            self._check_whole("keep", 0)
        self._check_whole("chunk_size", 1)
        if self.prefill_mode is not None:
            self._check_name("prefill_mode", PREFILL_MODES, "mode")
        if self.prefill_share is not None:
            try:
                replace(self.prefill_base, cap=self.prefill_share)
            except InputError:
                self._fail("prefill_share", "must be a number above 0 and at most 1: 0.25 reads a quarter of the pages")
        if self.prefill_mass is not None:
            try:
                replace(self.prefill_base, mass=self.prefill_mass)
            except InputError:
                self._fail("prefill_mass", "must be a number above 0 and below 1: 0.95 catches 95% of the attention")
        if self.prefill_dense is not None:
            self._check_whole("prefill_dense", 0)
        if self.pages_per_head not in (None, OFF):
            if not isinstance(self.pages_per_head, str):
                self._check_whole("pages_per_head", LEAST_PAGES)
            else:
                self._check_share_of_pages("pages_per_head")
        self._check_name("selector", SELECTORS, "selector")
        if self.select_from is not None:
            self._check_whole("select_from", 0)
        if self.hot_pool not in (None, OFF):
            if isinstance(self.hot_pool, str):
                self._fail("hot_pool", 'is no number of bytes: write one, or "off"')
            self._check_whole("hot_pool", 1)
        self._check_whole("page_size", 1)
        if self.page_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            nearest = min(PAGE_SIZES, key=lambda size: abs(size - self.page_size))
            self._fail("page_size", f"is not supported: use one of {sizes} (nearest: {nearest})")
        ratio = self.retrieval_ratio
        if ratio is not None:
            try:
                number(ratio, "ratio", 0, 1, above=True)
            except InputError:
                self._fail("retrieval_ratio", "must be a number above 0 and at most 1: 0.5 keeps half the KV heads")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Budget:
        """The shipped budget of that name (see `shipped_budgets`), or a TOML file.

        Raises:
            InputError: neither a shipped name nor a file, or a file that cannot be read.
            ConfigError: broken TOML, an unknown section or key, a wrong type, an impossible value.
        """
        if isinstance(name_or_path, str) and name_or_path in shipped_budgets():
            file = resources.files("longrun.plan.budgets").joinpath(f"{name_or_path}.toml")
            return cls.parse(file.read_text("utf-8"), name_or_path)
        path, text = user_path(name_or_path, "budget"), str(name_or_path)
        if not path.is_file():
            names = shipped_budgets()
            raise InputError(
                f"budget {quoted(text)} is neither a file nor a shipped budget: use one of "
                f"{', '.join(names)}{_hint(text, names)}, or the path of a TOML file"
            )
        return cls.parse(read_text(path, InputError, "a budget holds TOML in UTF-8"), short_path(text))

    @classmethod
    def parse(cls, text: str, source: str = "budget") -> Budget:
        """A budget from TOML text; `source` names it in messages. Raises ConfigError as `load` does."""
        source = short_path(source)
        data = parse_toml(text, source, ConfigError)
        fields: dict[str, Any] = {}
        for section, keys in data.items():
            known = _known_section(section, keys, source)
            for key, value in keys.items():
                if key not in known:
                    name = shortened(key)
                    raise ConfigError(f"{source}: [{section}] {name} is not a known key: {_where_to(name, section)}")
                fields[known[key]] = value
        for field in ("device_bytes", "host_bytes", "kv_bytes", "hot_pool"):
            if field in fields:
                fields[field] = _bytes_of(fields[field], field, source)
        if "device_bytes" not in fields:
            raise ConfigError(f'{source}: [memory] gpu is missing: say how much memory there is, like gpu = "80 GB"')
        return cls(**fields, source=source)

    @property
    def quantizes_pages(self) -> bool:
        """Whether pages of the budget's KV format are quantized."""
        return self.kv_format in QUANTIZED_KV_FORMATS

    def override(self, **fields: Any) -> Budget:
        """This budget with other values where they are not None: an option given by hand wins over the file.

        Raises:
            ConfigError: an impossible value; the message speaks of "options" and not of this budget's file.
        """
        given = {field: value for field, value in fields.items() if value is not None}
        return replace(replace(self, **given, source="options"), source=self.source) if given else self

    def _fail(self, field: str, why: str) -> None:
        section, key = _FIELD_PLACES[field]
        raise ConfigError(f"{self.source}: [{section}] {key} = {_toml(getattr(self, field))} {why}")

    def _check_whole(self, field: str, least: int) -> None:
        try:
            object.__setattr__(self, field, integer(getattr(self, field), field, least))
        except InputError:
            self._fail(field, f"must be a whole number of at least {least} and at most {MAX_INTEGER:,}")

    def _check_share_of_pages(self, field: str) -> None:
        try:
            share = share_of_pages(getattr(self, field), field)
        except InputError:
            self._fail(field, 'is no share above 0% and up to 100% in hundredths of a percent: write it like "25%"')
        if share is None:
            self._fail(field, 'is no number of pages: write one, a share like "25%", or "off"')

    def _check_name(self, field: str, names: tuple[str, ...], kind: str = "format") -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or value not in names:
            near = _hint(value, names) if isinstance(value, str) else ""
            self._fail(field, f"is not a known {kind}: use one of {', '.join(names)}{near}")


def shipped_budgets() -> tuple[str, ...]:
    """Names of the budgets that come with longrun, sorted."""
    files = resources.files("longrun.plan.budgets").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def _known_section(section: str, keys: Any, source: str) -> dict[str, str]:
    section = shortened(section)
    if not isinstance(keys, dict):
        if section in _SECTIONS:
            raise ConfigError(
                f"{source}: {section} = {_toml(keys)} is not a section: write [{section}] on a line of its own"
            )
        raise ConfigError(
            f"{source}: {section} = {_toml(keys)} stands outside every section: {_where_to(section, None)}"
        )
    if section not in _SECTIONS:
        raise ConfigError(
            f"{source}: [{section}] is not a known section: use one of "
            f"{', '.join(f'[{name}]' for name in _SECTIONS)}{_hint(section, _SECTIONS)}"
        )
    return _SECTIONS[section]


def _where_to(key: str, section: str | None) -> str:
    """What the writer of an unknown key probably meant: the nearest keys anywhere, or what sections there are.

    A key is near by its name in the file, by that of its `Budget` field, by section and name together, or with
    `_bytes`.
    """
    near = {
        (other, name): max(_similarity(key, text) for text in (name, field, f"{other}_{name}", f"{name}_bytes"))
        for other, keys in _SECTIONS.items()
        for name, field in keys.items()
    }
    nearest = max(_SECTIONS, key=lambda other: _similarity(key, other))
    best = max(near.values())
    if best >= 0.6 and best >= _similarity(key, nearest):
        meant = [place for place, similarity in near.items() if similarity == best]
        own = [name for other, name in meant if other == section]
        return f"did you mean {own[0] if own else ' or '.join(f'{name} under [{other}]' for other, name in meant)}?"
    if section is not None:
        return f"[{section}] has {', '.join(_SECTIONS[section])}"
    return (
        f"the sections are {', '.join(f'[{name}]' for name in _SECTIONS)} (nearest: [{nearest}], which has "
        f"{', '.join(_SECTIONS[nearest])})"
    )


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _hint(text: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(text[:VALUE_LIMIT], list(names), n=1)
    return f" (nearest: {near[0]})" if near else ""


def _bytes_of(value: Any, field: str, source: str) -> int | str:
    section, key = _FIELD_PLACES[field]
    what = f"{source}: [{section}] {key} ="
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ConfigError(f'{what} {_toml(value)} is not a memory size: write it like "80 GB" or "100 GiB"')
    try:
        if (field == "kv_bytes" and share_of(value) is not None) or (field == "hot_pool" and value == OFF):
            return value
        return parse_bytes(value, what)
    except InputError as error:
        raise ConfigError(str(error)) from None


def _toml(value: Any) -> str:
    """A value as it stands in the file, near enough to be found there."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{shortened(value)}"' if isinstance(value, str) else quoted(value)
