"""Names of sublayers, and which of them a search may remove."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KINDS = ("attention", "mlp")
CandidateKinds = str  # "attention", "mlp", "both", "blocks", or "any": single sublayers and whole blocks


@dataclass(frozen=True, order=True)
class Sublayer:
    """One residual branch of a block, counted from 0 at the input; prints as `12.attention`.

    Order is depth: a block's attention comes before its MLP.
    """

    block: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a sublayer is an attention or an mlp, not {self.kind!r}")
        if self.block < 0:
            raise ValueError(f"blocks are counted from 0, got {self.block}")

    def __str__(self) -> str:
        return f"{self.block}.{self.kind}"


@dataclass(frozen=True, order=True)
class Candidate:
    """What one removal takes out: a sublayer, or both sublayers of a block; prints as `12.mlp` or `12.block`."""

    sublayers: tuple[Sublayer, ...]

    def __str__(self) -> str:
        if len(self.sublayers) == 1:
            return str(self.sublayers[0])
        return f"{self.sublayers[0].block}.block"


def parse(name: str) -> Candidate:
    """Read `12.attention`, `12.mlp` or `12.block`.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+)\.(attention|mlp|block)", name)
    if match is None:
        raise ValueError(f"{name!r} is not a sublayer; write it as 12.attention, 12.mlp or 12.block")
    block, kind = int(match[1]), match[2]
    return Candidate(tuple(Sublayer(block, k) for k in (KINDS if kind == "block" else (kind,))))


def candidates(n_blocks: int, kinds: CandidateKinds = "both") -> list[Candidate]:
    """Everything a search over `kinds` could remove, by depth."""
    if kinds == "blocks":
        return [parse(f"{i}.block") for i in range(n_blocks)]
    if kinds == "any":
        return sorted([*candidates(n_blocks, "both"), *candidates(n_blocks, "blocks")])
    chosen = KINDS if kinds == "both" else (kinds,)
    return [Candidate((Sublayer(i, kind),)) for i in range(n_blocks) for kind in chosen]


def protected(names: Iterable[str], n_blocks: int) -> frozenset[Sublayer]:
    """The sublayers that `names` (`0.block`, `12.attention`, ...) say must stay.

    Raises:
        ValueError: a name that is no sublayer, or a block the model does not have.
    """
    found: set[Sublayer] = set()
    for name in names:
        for sublayer in parse(name).sublayers:
            if sublayer.block >= n_blocks:
                raise ValueError(f"cannot protect {name}: the model has blocks 0 to {n_blocks - 1}")
            found.add(sublayer)
    return frozenset(found)


@dataclass(frozen=True)
class FrontExclusion:
    """The authors' `exclude` rule: the first `int(N x / 2) + 1` blocks are out of reach until `int(N x) + 1` removals.

    N counts candidates. Source: the released code of arXiv 2405.18218, which computes it so for every candidate kind.
    """

    n_candidates: int
    share: float

    @property
    def n_blocks(self) -> int:
        return int(self.n_candidates * self.share / 2) + 1

    @property
    def until_removals(self) -> int:
        return int(self.n_candidates * self.share) + 1

    def covers(self, candidate: Candidate, n_removed: int) -> bool:
        """Whether `candidate` is out of reach after `n_removed` removals."""
        return n_removed < self.until_removals and candidate.sublayers[0].block < self.n_blocks


def open_candidates(
    all_candidates: Sequence[Candidate],
    removed: Sequence[Candidate],
    protected_sublayers: frozenset[Sublayer] = frozenset(),
    exclusion: FrontExclusion | None = None,
) -> list[Candidate]:
    """The candidates the next removal may take, by depth. None of their sublayers is gone."""
    gone = {s for candidate in removed for s in candidate.sublayers}
    return [
        c
        for c in all_candidates
        if gone.isdisjoint(c.sublayers)
        and protected_sublayers.isdisjoint(c.sublayers)
        and not (exclusion and exclusion.covers(c, len(removed)))
    ]


def most_removals(open_: Iterable[Candidate]) -> int:
    """How many of these candidates can be removed one after the other: a block and its sublayers exclude each other."""
    return len({candidate.sublayers[0] for candidate in open_})
