"""What the gate found, and what became of a registration."""

from __future__ import annotations

from typing import Literal

from finercut.system.records import Record


class GateCheck(Record):
    name: str
    value: float | None
    limit: float
    passed: bool
    reason: str
    """One sentence."""


class RegisterReport(Record):
    status: Literal["registered", "already registered", "refused"]
    passed: bool
    checks: list[GateCheck]
    name: str
    version: str | None
    model_uri: str | None
    run_id: str
    tracking_uri: str
    """Without credentials."""
