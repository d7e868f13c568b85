"""Refit in the loop of greedy search: candidates are judged in the model as healing will leave it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.families import layout_of
from finercut.selection.bench import Bench
from finercut.selection.depth import Depth
from finercut.selection.records import Refitted
from finercut.selection.refit import check, fit
from finercut.selection.settings import Refitting
from finercut.sublayers import Candidate, Sublayer


class Repair:
    """The kept projections of the model that is searched, refitted after every so many removals.

    Each refit starts from the whole model's weights, so it depends on the removals alone, and a search that was killed
    continues to the same bytes.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, settings: Refitting) -> None:
        """
        Args:
            windows: to fit to: token ids, (samples, tokens).

        Raises:
            ValueError: a model or windows that a refit cannot do with, or a model on several devices.
        """
        check(layout_of(model.config), model.config.model_type)
        if hasattr(model, "hf_device_map"):
            raise ValueError("search.refit needs the model on one device: set search.device to a GPU that holds it")
        self.model = model
        self.windows = windows.to(model.device)
        self.settings = settings
        Depth(model, self.windows, (), settings.batch_tokens)  # refuses now what it would after the first removal
        self.removed: Sequence[Sublayer] = ()
        self._own: dict[str, Tensor] = {}
        self._fitted: dict[str, Tensor] = {}

    def undo(self) -> None:
        """Give the model the whole one's weights."""
        self._set(self._own)

    def apply(self, bench: Bench, gone: Sequence[Candidate], divergence: float) -> Refitted | None:
        """Refit the model of `bench`, if that brings its divergence on the calibration tokens down.

        Args:
            gone: what is removed.
            divergence: with the whole model's weights, which the model has.

        Returns:
            What it measures now; None where it keeps its weights.
        """
        settled = len(gone) - len(gone) % self.settings.every
        removed = [s for candidate in gone[:settled] for s in candidate.sublayers]
        if not removed:
            return None
        if removed != self.removed:
            depth = fit(self.model, self.windows, removed, self.settings.ridges, self.settings.batch_tokens)
            self.removed, self._own = removed, depth.originals
            self._fitted = {name: self.model.get_parameter(name).data for name in depth.originals}
        self._set(self._fitted)
        bench.rerun()
        found = bench.divergence_now()
        if not found < divergence:
            self.undo()
            bench.rerun()
            return None
        return Refitted(divergence=found, held_out_divergence=bench.held_out_divergence())

    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.model.get_parameter(name).data = value
