"""What the modes save as the calibration set grows, and what no test could save more: `python benchmarks/replay.py`.

Every candidate's divergences are computed once a step, to the end, on every window (brute force). Then the modes'
decisions are replayed on the first 4, 8, 16, ... windows, so that one recording serves all; the removals are those that
all windows together lead to. Decisions follow from numbers alone, so a replay counts what a search would. Nothing is
timed. Prints a table after every step; the last line is one JSON document.

Beside the modes, two bounds of what a test that drops candidates can save, without and with the values of earlier
steps: it knows the least candidate beforehand, evaluates that one to the end, and has seen enough of any other, that
nothing else rules out, after its first window.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from search import forward_equivalents
from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.families import layout_of
from finercut.model.loading import load_whole
from finercut.model.workers import Workers
from finercut.selection.blocks import Blocks
from finercut.selection.divergence import DIVERGENCES
from finercut.selection.race import Known, Part, Race, Segments, Totals
from finercut.selection.sweep import SEGMENT_TOKENS, Sweep, micro_batch
from finercut.sublayers import Candidate, candidates
from finercut.tokens import load_tokens

MODES = ("brute", "exact", "lazy", "racing")
BOUNDS = ("one window", "one window, lazy")


class Clairvoyant(Race):
    """Knows the least candidate beforehand, and drops any other after its first window."""

    least: Candidate

    def _likely_least(self) -> Candidate:
        return self.least

    def record(self, totals: Totals) -> None:
        super().record(totals)
        self.dropped |= {c: self.least for c in self._alive() if self.done[c] and c != self.least}


class Replay:
    """One way of deciding, on the first windows of what was recorded."""

    def __init__(self, way: str, n_windows: int, error_probability: float) -> None:
        self.way = way
        self.n_windows = n_windows
        self.error_probability = error_probability
        self.known: Known = {}
        self.passes = self.segments = self.steps = self.other = 0

    def step(self, recorded: dict[Candidate, list[Segments]], passes: dict[Candidate, int]) -> None:
        """Count one step, of the candidates recorded; `passes` a window."""
        mode = "racing" if self.way in BOUNDS else self.way
        kind = Clairvoyant if self.way in BOUNDS else Race
        known = {} if self.way == "one window" else self.known
        n_segments = len(next(iter(recorded.values()))[0])
        race = kind(list(recorded), self.n_windows, n_segments, mode, known, self.error_probability)
        totals = {c: sum(map(sum, windows[: self.n_windows])) for c, windows in recorded.items()}
        least = min(totals, key=lambda c: (totals[c], c))
        if isinstance(race, Clairvoyant):
            race.least = least
        for part in race.parts():
            race.record(evaluated(part, recorded))
            self.passes += sum(passes[c] for row in part.values() for c in row)
        values = race.outcome().values
        self.segments += race.segments
        self.steps += 1
        self.other += min(values, key=lambda c: (values[c], c)) != least
        self.known = {**self.known, **race.now_known()}


def evaluated(part: Part, recorded: dict[Candidate, list[Segments]]) -> Totals:
    """What a part comes to; a candidate over its limit goes no further."""
    return {w: {c: until(limit, recorded[c][w]) for c, limit in row.items()} for w, row in part.items()}


def until(limit: float, segments: Segments) -> Segments:
    total = 0.0
    for number, segment in enumerate(segments, 1):
        total += segment
        if total > limit:
            return segments[:number]
    return segments


def record(
    model: PreTrainedModel, tokens: Tensor, n_removals: int
) -> Iterator[tuple[Candidate, dict[Candidate, list[Segments]], dict[Candidate, int]]]:
    """Each step's removal, every candidate's segments on every window, and the sublayers a window goes through."""
    layout = layout_of(model.config)
    with torch.inference_mode():
        blocks = Blocks(model, layout, tokens[:1])
    sizes = micro_batch(blocks, *tokens.shape)
    sweep = Sweep(blocks, tokens, DIVERGENCES["js"], Workers(model.device), sizes)
    pool = candidates(len(layout.holders(model)))
    for _ in range(n_removals):
        race = Race(pool, len(tokens), sweep.n_segments, "brute")
        for part in race.parts():
            race.record(sweep.totals(part))
        values = race.outcome().values
        least = min(values, key=lambda c: (values[c], c))
        segments = {c: [race.done[c][w] for w in range(len(tokens))] for c in pool}
        yield least, segments, {c: sweep.passes(c) for c in pool}
        sweep.remove(least.sublayers)
        pool.remove(least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("artifacts/model"))
    parser.add_argument("--calibration", type=Path, default=Path("artifacts/calibration"))
    parser.add_argument("--windows", type=int, default=32, help="to cut out of the calibration set, a power of two")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each")
    parser.add_argument("--removals", type=int, default=15)
    parser.add_argument("--error-probability", type=float, default=0.05)
    chosen = parser.parse_args()
    model = load_whole(chosen.model, torch.float32)
    # Neighbours come from different texts, as in a calibration set of so many short windows.
    pieces = load_tokens(chosen.calibration).calibration.split(chosen.tokens, dim=1)
    tokens = torch.cat([piece for piece in pieces if piece.shape[1] == chosen.tokens])[: chosen.windows]
    if len(tokens) < chosen.windows:
        parser.error(
            f"{chosen.calibration} gives {len(tokens)} windows of {chosen.tokens} tokens, not {chosen.windows}"
        )
    numbers = [2**k for k in range(2, chosen.windows.bit_length())]
    replays = [Replay(way, n, chosen.error_probability) for n in numbers for way in (*MODES, *BOUNDS)]
    removals, full = [], 0
    for least, segments, passes in record(model, tokens, chosen.removals):
        for replay in replays:
            replay.step(segments, passes)
        removals.append(str(least))
        full += len(segments)
        print(
            f"\nafter {len(removals)} of {chosen.removals} removals\n{table(replays, model, tokens.shape[1], full)}",
            flush=True,
        )
    document = {
        "windows": chosen.windows,
        "tokens": chosen.tokens,
        "removals": removals,
        "error_probability": chosen.error_probability,
        "ways": [figures(replay, model, tokens.shape[1], full) for replay in replays],
    }
    print(json.dumps(document))


def figures(replay: Replay, model: PreTrainedModel, n_tokens: int, n_forwards: int) -> dict[str, Any]:
    """`n_forwards` a window would be taken by full forwards of every candidate."""
    forwards = forward_equivalents(model, replay.passes, replay.segments * SEGMENT_TOKENS, n_tokens)
    return {
        "way": replay.way,
        "windows": replay.n_windows,
        "sublayer_passes": replay.passes,
        "head_tokens": replay.segments * SEGMENT_TOKENS,
        "less_work": n_forwards * replay.n_windows / forwards,
        "other_removals": replay.other,
        "steps": replay.steps,
    }


def table(replays: Sequence[Replay], model: PreTrainedModel, n_tokens: int, n_forwards: int) -> str:
    """Less work than full forwards, with the steps in which another candidate was removed in brackets."""
    lines = ["".join(f"{name:>18}" for name in ("windows", *MODES, *BOUNDS))]
    rows: dict[int, list[str]] = {}
    for replay in replays:
        found = figures(replay, model, n_tokens, n_forwards)
        other = f" ({replay.other})" if replay.other else ""
        rows.setdefault(replay.n_windows, []).append(f"{found['less_work']:.1f}{other}")
    lines += ["".join(f"{cell:>18}" for cell in (str(n), *cells)) for n, cells in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
