"""Rules by which pages are chosen, by name; `longrun.lab.selection` says what an index computes, and follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

PAGE = 64
TODAY = "min/max 64 rotated (today's)"
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGEST_LAMBDAS = (0.0, 0.25, 0.375, 0.5, 0.75)
DIGESTS = (  # tokens of a group, bits of a centre and of a half-range, what is taken off first
    (16, 8, 4, ""), (16, 8, 8, ""), (16, 6, 4, ""), (16, 4, 2, ""), (16, 4, 4, "first"), (16, 4, 4, "page"),
    (8, 4, 0, ""),
)  # fmt: skip
COARSE_SHARES = (0.26, 0.06, 0.04, 0.013)
_KINDS = {"mean": ("plain", False), "middle": ("plain", True), "unturned": ("unturned", False)}


@dataclass(frozen=True)
class Index:
    """What is kept of a text's keys to choose by; see `longrun.lab.selection`.

    Attributes:
        group: tokens of a vector; 1: the keys themselves, of 16, 4, 2 or 1 bits.
        lam: weight of the half-range; 0: none is kept.
        basis: "plain", "rotated", "unturned" or "digest".
        bits: of an element.
        half_bits: of a half-range's element in a digest.
        less: what is taken off a digest's centres before they are rounded: "first" the mean of the head's page 1,
            "page" the page's own, which is kept with 8 bits.
        best: the best group of a page counts, instead of the log-sum-exp of all.
        unit: tokens that are chosen together, PAGE or the group.
    """

    group: int
    lam: float = 0.0
    basis: str = "plain"
    middle: bool = False
    bits: int = 16
    best: bool = False
    unit: int = PAGE
    half_bits: int = 4
    less: str = ""

    def token_bytes(self, head_dim: int) -> float:
        """Bytes a token of one KV head."""
        if self.group == 1:
            scales = 0 if self.bits == 16 else 2 * 2 * head_dim / PAGE
            return head_dim * self.bits / 8 + scales
        if self.basis == "digest":
            halves = head_dim * self.half_bits / 8 + 2 if self.lam else 0
            of_page = (head_dim + 2) / PAGE if self.less == "page" else 0
            return (head_dim * self.bits / 8 + 2 + halves) / self.group + of_page
        of_half = 0 if not self.lam else head_dim // 2 if self.basis == "unturned" else head_dim
        scales = 0 if self.bits == 16 else 2 * (1 + bool(self.lam))
        return ((head_dim + of_half) * self.bits / 8 + scales) / self.group


@dataclass(frozen=True)
class Rule:
    """How units are ranked.

    Attributes:
        index: None: by the attention that they get in truth, summed over a KV head's queries: nothing loses less.
        coarse: the share of all units that the index chooses, to be ranked again by the keys themselves.
        unit: tokens, where there is no index.
    """

    index: Index | None
    coarse: float | None = None
    unit: int = PAGE

    @property
    def chosen_unit(self) -> int:
        return self.unit if self.index is None else self.index.unit


def known_rules() -> dict[str, Rule]:
    """By name."""
    indices = {
        "keys": Index(1), **{f"{bits}-bit keys": Index(1, bits=bits) for bits in (4, 2, 1)},
        TODAY: Index(64, 1, "rotated", middle=True), "min/max 64": Index(64, 1, middle=True),
        "min/max 16 best": Index(16, 1, middle=True, best=True),
        "middle 16 + 0.5 best": Index(16, 0.5, middle=True, best=True),
        "mean 64": Index(64), "mean 32": Index(32), "mean 16": Index(16), "mean 8": Index(8),
        "mean 16 best": Index(16, best=True), "unturned 16 + 0.25": Index(16, 0.25, "unturned"),
        "middle 8 + 0.5 at 4 bits": Index(8, 0.5, middle=True, bits=4),
    }  # fmt: skip
    indices |= {f"middle 16 + 0.5 at {bits} bits": Index(16, 0.5, middle=True, bits=bits) for bits in (16, 8, 3, 2)}
    indices |= {fitted_name(kind, lam): Index(16, lam, *_KINDS[kind], 4) for kind in _KINDS for lam in LAMBDAS}
    units = ("keys", "mean 16", *(fitted_name(kind, lam) for kind in _KINDS for lam in (0.25, 0.5, 0.75)))
    coarse = {
        "mean 64 at 8 bits": Index(64, bits=8), "mean 64 at 4 bits": Index(64, bits=4),
        "mean 32 at 4 bits": Index(32, bits=4), "middle 64 + 0.5 at 4 bits": Index(64, 0.5, middle=True, bits=4),
        "unturned 64 + 0.25 at 4 bits": Index(64, 0.25, "unturned", bits=4),
        "middle 16 + 0.5 at 4 bits": indices["middle 16 + 0.5 at 4 bits"],
        "unturned 16 + 0.25 at 4 bits, 16-token units": Index(16, 0.25, "unturned", bits=4, unit=16),
    }  # fmt: skip
    found = {"perfect": Rule(None), "perfect, 16-token units": Rule(None, unit=16)}
    found |= {name: Rule(index) for name, index in (indices | coarse).items()}
    found |= {f"{name}, 16-token units": Rule(replace(indices[name], unit=16)) for name in units}
    for name, index in coarse.items():
        found |= {f"{100 * share:g}% by {name}, then keys": Rule(index, share) for share in COARSE_SHARES}
    return found


def digest_rules() -> dict[str, Rule]:
    """By name: digests of pages as they are stored, beside what they are judged by."""
    names = ("perfect", "keys", TODAY, fitted_name("mean", 0), fitted_name("mean", 0.25))
    indices = [Index(16, lam, "digest", bits=4) for lam in DIGEST_LAMBDAS]
    indices += [
        Index(group, 0.25 if half_bits else 0, "digest", bits=bits, half_bits=half_bits, less=less)
        for group, bits, half_bits, less in DIGESTS
    ]
    found = {name: rule for name, rule in known_rules().items() if name in names}
    return found | {_digest_name(index): Rule(index) for index in indices}


def _digest_name(index: Index) -> str:
    halves = f" + {index.lam:g} of {index.half_bits}" if index.lam else ""
    return f"digest of {index.group}, {index.bits} bits{halves}" + (f", less {index.less}" if index.less else "")


def fitted_name(kind: str, lam: float) -> str:
    """Name of the rule by groups of 16 tokens at 4 bits, "mean", "middle" or "unturned", with `lam` times the
    half-range."""
    return f"{kind} 16 + {lam:g} at 4 bits" if lam else f"{kind} 16 at 4 bits"


def pages_of(budget: str, pages: int) -> int:
    """A budget in pages: of "64" so many, of "6%" that share of all."""
    return max(1, round(float(budget[:-1]) / 100 * pages)) if budget.endswith("%") else int(budget)
