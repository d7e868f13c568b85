"""The step `heal`: repairs a pruned checkpoint. Its only method so far is `none`, which changes nothing."""

from __future__ import annotations

from pathlib import Path

from finercut.checkpoint.records import Claim, HealReport
from finercut.checkpoint.settings import Heal
from finercut.checkpoint.steps import Inputs, Proof, link_files
from finercut.model.directory import ModelDirectory


def apply(parent: ModelDirectory, directory: Path, settings: Heal, inputs: Inputs) -> HealReport:
    """Write the healed checkpoint; with `none` the parent's own files, by a second name where the disk has links."""
    link_files(parent.path, directory)
    return HealReport(method=settings.method, changed=[], sha256=ModelDirectory(directory).weights_sha256)


def claim(parent: ModelDirectory, child: ModelDirectory, proof: Proof) -> Claim:
    """With `none`: the weights and the config are the parent's."""
    same = parent.weights_sha256 == child.weights_sha256 and parent.settings == child.settings
    return Claim(
        name="heal", statement="has the pruned checkpoint's weights, unchanged", holds=same, figures={}, limit=None
    )
