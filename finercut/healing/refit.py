"""Healing in closed form, see `finercut.selection.refit`."""

from __future__ import annotations

from finercut.healing import along_depth
from finercut.healing.settings import Refit
from finercut.healing.task import Healed, Task
from finercut.model.families import Layout
from finercut.selection.refit import ClosedForm, check


def heal(task: Task, settings: Refit) -> Healed:
    """
    Raises:
        ValueError: sublayers that run in parallel, or a single window.
        RuntimeError: values that are not finite.
    """
    check(Layout.from_dict(task.pruned.settings["finercut"]["layout"]), task.whole.config.model_type)
    found = along_depth.heal(task, settings, lambda depth: ClosedForm(depth, settings.ridges))
    return Healed(found, task.windows.numel() if found else 0)
