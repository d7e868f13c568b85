"""What methods share that fit one kept sublayer after the other: continuing an interrupted run, and the choice of how
much of the whole change is applied."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from finercut.healing.fidelity import Fidelity, logits_of
from finercut.healing.settings import Distill, Reconstruct, Refit
from finercut.healing.task import Task
from finercut.model.directory import quiet
from finercut.model.loading import load_pruned, load_whole
from finercut.selection.depth import Depth, Fit, Fitted, Place
from finercut.system.staging import staged_file

logger = logging.getLogger("finercut")


def heal(task: Task, settings: Refit | Reconstruct | Distill, method: Callable[[Depth], Fit]) -> dict[str, Tensor]:
    """Fit the kept sublayers, continuing where an interrupted run of the same inputs and settings stopped.

    Args:
        method: makes what fits a sublayer.

    Returns:
        The new values, or values on the way to them, whichever diverge least on held-out tokens; none if that is the
        pruned model itself.

    Raises:
        ValueError: a single window.
        RuntimeError: values that are not finite.
    """
    folder = task.folder(settings)
    with quiet():
        model = load_whole(task.whole, task.dtype, task.device)
        depth = Depth(model, task.windows.to(task.device), task.pruned.removed, settings.batch_tokens, task.stored)
        with tqdm(desc="heal", unit="sublayer", total=depth.n_places, disable=None) as bar:
            found = depth.run(_keeping(method(depth), task, folder, bar))
        depth.undo()
        task.held_out.expect(logits_of(model), task.device)
        return _best_fraction(task, found, settings.fractions)


def _keeping(fit: Fit, task: Task, folder: Path, bar: tqdm) -> Fit:
    """`fit`, which tells what it found and stores it, or finds it stored."""

    def keeping(place: Place) -> Fitted:
        file = folder / f"{place.name}.safetensors"
        if file.is_file():
            logger.info("heal: %s was fitted by an interrupted run", place.name)
            found = Fitted(load_file(file), 0.0, "")
        else:
            found = fit(place)
            logger.info(
                "heal: %s, %s, explains %.1f %% of what is missing%s",
                place.name,
                found.how,
                100 * found.explained,
                "" if found.values else ": it is left as it is",
            )
            task.on_metrics({"heal.explained": found.explained}, place.step)
            with staged_file(file) as partial:
                save_file({name: value.contiguous() for name, value in found.values.items()}, partial)
        bar.update()
        return found

    return keeping


def _best_fraction(task: Task, fitted: dict[str, Tensor], fractions: Sequence[float]) -> dict[str, Tensor]:
    pruned = load_pruned(task.pruned, task.dtype, task.device)
    own = {name: pruned.get_parameter(name).detach().cpu() for name in fitted}
    own |= {name: value for name in fitted if (value := task.stored(name)) is not None}

    def found_now() -> Fidelity:
        return task.held_out.fidelity(logits_of(pruned), task.device)

    least, best = found_now().divergence, {}
    logger.info("heal: before, held-out divergence %.4f", least)
    for fraction in fractions if fitted else ():
        values = {n: own[n].lerp(new.to(own[n].dtype), fraction) if fraction < 1 else new for n, new in fitted.items()}
        for name, value in values.items():
            parameter = pruned.get_parameter(name)
            parameter.data = value.to(parameter)
        found = found_now()
        logger.info(
            "heal: %g of the change, held-out divergence %.4f, perplexity %.2f",
            fraction,
            found.divergence,
            found.perplexity,
        )
        if found.divergence < least:
            least, best = found.divergence, values
    return best
