"""One pass through the depth that fits kept sublayers in order, each to the whole model's residual stream.

The whole model's stream and the pruned one's go through the blocks side by side. At a kept unit, the target is the
whole model's stream just before the next kept one: it contains the removed sublayers in between, and its difference
from the pruned model's own stream contains the drift of everything before. A token counts by the inverse square of its
target's norm, because the next sublayer's norm divides by about that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from finercut.model.families import layout_of
from finercut.model.modeling_finercut import followers
from finercut.selection.blocks import Blocks, Unit
from finercut.sublayers import Sublayer

# Of the windows, the share that a fit is judged by. They come first.
CHOOSING_SHARE = 0.25
# A fit that explains less of what is missing, on windows it did not see, is not taken.
LEAST_GAIN = 0.01
# A token counts at most this many times as much as the median token.
MOST_WEIGHT = 10.0


@dataclass(frozen=True)
class Place:
    """A kept unit and what it is fitted to, for all windows."""

    unit: Unit
    group: Sequence[Unit]
    """The unit and those behind it, all removed, up to the next kept one."""
    at_gap: bool
    """Something is removed in the unit, right before it or right behind it."""
    before: Tensor
    """The pruned model's stream before the unit, (windows, tokens, hidden)."""
    target: Tensor
    """The whole model's stream behind the group."""
    weights: Tensor
    """Of the tokens, (windows, tokens), float32."""

    @property
    def name(self) -> str:
        return "+".join(map(str, self.unit.sublayers))

    @property
    def step(self) -> int:
        """Sublayers before the unit in the whole model, for an axis."""
        first = self.unit.sublayers[0]
        return 2 * first.block + (first.kind == "mlp")


@dataclass(frozen=True)
class Fitted:
    """What was found for a unit."""

    values: Mapping[str, Tensor]
    """Of parameters by name, in the dtype they are stored in. Empty: it stays as it is."""
    explained: float
    """Share of what is missing in the stream that they add, on the windows that the fit did not see."""
    how: str
    """For people."""
    judged: Mapping[str, Tensor] = field(default_factory=dict)
    """What `explained` is about, where `values` were then fitted to all windows; as `values`."""


Fit = Callable[[Place], Fitted]


# Sizes in configs whose blocks hand on more than one residual stream.
_SAID_BY = ("altup_num_inputs", "hc_mult", "hidden_size_per_layer_input", "num_kv_shared_layers")


def check(config: PreTrainedConfig) -> None:
    """What `Depth` refuses, as far as the config says it.

    Raises:
        ValueError: blocks that hand on more than the residual stream.
    """
    language = config.get_text_config()
    if followers(language) or any(getattr(language, name, None) for name in _SAID_BY):
        raise _carried(config)


def _carried(config: PreTrainedConfig) -> ValueError:
    return ValueError(
        f"blocks of a {config.model_type} model hand on more than the residual stream, to which alone sublayers can be "
        "fitted: set heal.method to distill, and search.refit to null"
    )


class Depth:
    """A whole model, the windows that its kept sublayers are fitted to, and what is removed."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        removed: Iterable[Sublayer],
        batch_tokens: int,
        stored: Callable[[str], Tensor | None] = lambda name: None,
    ) -> None:
        """
        Args:
            windows: token ids, (samples, tokens), on the model's device.
            batch_tokens: that go through a sublayer at once.
            stored: a parameter as the checkpoint stores it, by name: new values are rounded to its dtype before the
                next sublayer is fitted. None: as in the model.

        Raises:
            ValueError: a single window, or blocks that hand on more than the residual stream.
        """
        if len(windows) < 2:
            raise ValueError(
                "fitting sublayers takes two windows at least, one to fit to and one to judge by: raise "
                "calibrate.n_healing_samples"
            )
        self.model = model
        self.layout = layout_of(model.config)
        self.removed = frozenset(removed)
        self.stored = stored
        with torch.no_grad():
            self.blocks = Blocks(model, self.layout, windows[:1])
        if self.blocks.carries:
            raise _carried(model.config)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.windows = windows
        self.n_at_once = max(1, batch_tokens // windows.shape[1])
        self.choosing = slice(max(1, round(CHOOSING_SHARE * len(windows))))
        self.fitting = slice(self.choosing.stop, len(windows))
        self.originals: dict[str, Tensor] = {}
        """Of the parameters that `set` replaced."""
        self.groups = self._groups()

    @property
    def n_places(self) -> int:
        return sum(place for _, place, _ in self.groups)

    @torch.no_grad()
    def run(self, fit: Fit) -> dict[str, Tensor]:
        """Fit the kept units from the first gap on, and set the model's parameters to what was found.

        Returns:
            New values by parameter name, in the dtype they are stored in.
        """
        whole = pruned = torch.cat([self.blocks.embed(batch) for batch in self.windows.split(self.n_at_once)])
        found: dict[str, Tensor] = {}
        differ = False
        for group, is_place, at_gap in self.groups:
            after = self.advance(group, whole, ())
            if is_place:
                values = fit(Place(group[0], group, at_gap, pruned, after, _weights(after))).values
                self.set(values)
                found |= values
            differ |= at_gap
            pruned = self.advance(group, pruned, self.removed) if differ else after
            whole = after
        return found

    def advance(self, group: Iterable[Unit], states: Tensor, removed: Iterable[Sublayer]) -> Tensor:
        """Run all windows' (windows, tokens, hidden) stream through some units."""
        return torch.cat([self.through(group, batch, removed) for batch in states.split(self.n_at_once)])

    def through(self, group: Iterable[Unit], states: Tensor, removed: Iterable[Sublayer]) -> Tensor:
        """The same for one batch."""
        for unit in group:
            states = self.blocks.run(unit, states, removed)
        return states

    def parameters(self, unit: Unit) -> dict[str, nn.Parameter]:
        """Those of what is kept of a unit, by their names in the model."""
        return {self.names[id(p)]: p for p in self.blocks.module(unit, self.removed).parameters()}

    def own(self, name: str) -> Tensor:
        """A parameter's value as the checkpoint stores it, on the model's device; not to be changed."""
        parameter = self.model.get_parameter(name)
        stored = self.stored(name)
        return parameter.detach() if stored is None else stored.to(parameter.device)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Replace parameters; `undo` puts back what they were."""
        for name, value in values.items():
            parameter = self.model.get_parameter(name)
            self.originals.setdefault(name, parameter.data)
            parameter.data = value.to(self.originals[name])

    def undo(self) -> None:
        for name, value in self.originals.items():
            self.model.get_parameter(name).data = value

    def _groups(self) -> list[tuple[list[Unit], bool, bool]]:
        """Each kept unit with the removed ones behind it; whether it is a `Place`, and whether it is at a gap."""
        gone = self.removed.issuperset
        groups: list[list[Unit]] = []
        for unit in self.blocks.units:
            if groups and gone(unit.sublayers):
                groups[-1].append(unit)
            else:
                groups.append([unit])
        has_gap = [not self.removed.isdisjoint(s for unit in group for s in unit.sublayers) for group in groups]
        return [
            (group, any(has_gap[: i + 1]) and not gone(group[0].sublayers), has_gap[i] or (i > 0 and has_gap[i - 1]))
            for i, group in enumerate(groups)
        ]


def _weights(target: Tensor) -> Tensor:
    """Of each token. The first position holds no text in some models, and the largest values of the stream in most."""
    squares = torch.cat([window.float().square().sum(-1) for window in target.split(1)])
    weights = 1 / squares.clamp_min(torch.finfo(torch.float32).tiny)
    weights = weights.clamp_max(MOST_WEIGHT * weights[:, 1:].median())
    weights[:, 0] = 0
    return weights
