"""Records of checks and of a registration."""

from __future__ import annotations

from typing import Literal

from finercut.system.records import Record


class Check(Record):
    """One line of a judgement: by the gate's limits, or of a challenger beside the champion."""

    name: str
    value: float | None
    """None where there is no figure."""
    limit: float | None = None
    champion: float | None = None
    """The champion's figure, in a comparison."""
    passed: bool
    reason: str
    """One sentence."""


class RegisterReport(Record):
    status: Literal["registered", "already registered", "refused"]
    passed: bool
    checks: list[Check]
    name: str
    version: str | None
    model_uri: str | None
    run_id: str
    tracking_uri: str
    """Without credentials."""
