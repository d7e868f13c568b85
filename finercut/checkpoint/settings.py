"""Section `prune` of params.yaml."""

from __future__ import annotations

from finercut.selection.settings import Budget
from finercut.system.settings import Section


class Prune(Section):
    budget: Budget
