"""One row of a quality comparison: its heads at a length, its name in a plot, and what `longrun.load` takes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longrun.lab.quality import shares
from longrun.lab.quality.formats import is_simulated
from longrun.lab.quality.row_fields import SPARSE_FIELDS, SYSTEM, RowFields
from longrun.patterns.baseline_maps import inverted_map, random_map, streaming_map
from longrun.patterns.head_map import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, HeadMap, HeadSplit
from longrun.specs.prefill_spec import SPARSE
from longrun.units import parse_bytes

REFERENCE = "reference"


@dataclass(frozen=True)
class Row(RowFields):
    """One setting to measure. Fields: `RowFields`."""

    @property
    def select_from(self) -> int | None:
        """Steps of a row that selects do so at any length, also where reading all takes less time."""
        return None if self.select is None else 0

    @property
    def read_exactly(self) -> Row:
        """The row without what it says of sparse reading."""
        return replace(self, prefill=None, **{name: Row.__dataclass_fields__[name].default for name in SPARSE_FIELDS})

    @property
    def by_length(self) -> bool:
        """Its heads keep other tokens at every tested length."""
        return self.kv_share is not None or self.kv_bytes is not None or self.keep == SYSTEM

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
    def stored_kv(self) -> str:
        """The page format that `longrun.load` takes: simulated formats are held in bf16 pages."""
        return "bf16" if is_simulated(self.kv) else self.kv

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
        varied = ", varied window" if self.has_window and self.kv_share is None else ""
        return f"{what}, {self.kv}{weights}{varied}{self._chunks}"

    @property
    def _chunks(self) -> str:
        return "" if self.chunk_size is None else f", chunks of {self.chunk_size:,}"

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
        newer = {"keep", "select", "select_question", "prefill", *SPARSE_FIELDS}
        newer = {name for name in newer if getattr(self, name) in (None, False)}
        return {name: value for name, value in asdict(self).items() if name not in newer}


REFERENCE_ROW = Row(REFERENCE, kv="bf16")
