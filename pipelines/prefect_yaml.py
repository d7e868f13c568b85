"""Reads prefect.yaml, and finds what Prefect would refuse or pass over before anything is declared."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.settings import get_current_settings
from prefect.types.names import Name
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values
from pydantic import TypeAdapter, ValidationError

from finercut.system import yaml_files

from . import settings
from .flow import compress

FILE = Path("prefect.yaml")
# Of deployments that name none.
ENTRYPOINT = f"{__package__}.flow.compress"
POOL = "finercut"
# As Prefect reads it; beside a deployment's own steps there may be some for all.
_KEYS = {
    *("name", "version", "version_type", "tags", "description", "schedule", "schedules", "paused", "concurrency_limit"),
    *("flow_name", "entrypoint", "parameters", "enforce_parameter_schema", "build", "push", "pull", "work_pool"),
    *("triggers", "sla"),
}
# Each with what else may be given.
_SCHEDULES = {
    "cron": (CronSchedule, {"day_or"}),
    "interval": (IntervalSchedule, {"anchor_date"}),
    "rrule": (RRuleSchedule, set()),
}
_OF_EVERY_SCHEDULE = {"timezone", "active", "parameters", "slug", "replaces"}
# A run takes minutes at least.
_LEAST_PAUSE = timedelta(minutes=1)


class Due(NamedTuple):
    """When a schedule is due."""

    what: str
    at: datetime


class Document(NamedTuple):
    text: dict[str, Any]
    """All of prefect.yaml, with the defaults of what it leaves out or empty, so that Prefect asks for nothing."""
    due: dict[str, list[Due]]
    """By the deployment's name its schedules; not those with values that Prefect puts in later."""


def read() -> Document:
    """
    Raises:
        FileNotFoundError: there is no prefect.yaml.
        ValueError: it has no deployments, one without a name or with a key or a value that is none of Prefect's,
            parameters or overrides that are not allowed, or a schedule that is none or never due.
    """
    if not FILE.is_file():
        raise FileNotFoundError(f"no {FILE} here; run from the project's root")
    document = yaml_files.read(FILE, version="1.1")
    found = document.get("deployments") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{FILE}: `deployments` is no list of deployments; give at least one")
    if document.get("pull") is None:
        # Prefect looks for the folder in an entrypoint that names a file, and ours names a module.
        document["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}]
    deployments, due = [], {}
    for number, entry in enumerate(found, start=1):
        deployment, schedules = _complete(entry, number)
        if deployment["name"] in due:
            raise ValueError(f"{FILE}: two deployments are called {deployment['name']}; rename one")
        deployments.append(deployment)
        due[deployment["name"]] = schedules
    return Document(document | {"deployments": deployments}, due)


def _complete(entry: object, number: int) -> tuple[dict[str, Any], list[Due]]:
    deployment = _mapping(entry, f"deployment {number}")
    name = deployment["name"] = _name(deployment.get("name"), f"deployment {number} has no name")
    where = f"deployment {name}"
    _check(f"{where}: name", TypeAdapter(Name).validate_python, name)
    if unknown := sorted(map(str, deployment.keys() - _KEYS)):
        raise ValueError(
            f"{FILE}: {where}: a deployment has no {', '.join(unknown)}; it may have {', '.join(sorted(_KEYS))}"
        )
    deployment["parameters"] = _parameters(deployment, where)
    deployment.setdefault("entrypoint", ENTRYPOINT)
    deployment["work_pool"] = _work_pool(deployment, where)
    tags, limit = deployment.get("tags", []), deployment.get("concurrency_limit", 1)
    if not _is_template(tags):
        _check(f"{where}: tags", TypeAdapter(list[str]).validate_python, tags)
    if not _is_template(limit):
        config = limit if isinstance(limit, dict) else {"limit": limit}
        if _check(f"{where}: concurrency_limit", ConcurrencyLimitConfig.model_validate, config).limit < 1:
            raise ValueError(f"{FILE}: {where}: concurrency_limit: no run could begin with {config['limit']}")
    _check_settings(deployment["parameters"], where)
    return deployment, _schedules(deployment, where)


def _schedules(deployment: dict[str, Any], where: str) -> list[Due]:
    """When those of a deployment are due; what they leave empty is gone afterwards."""
    schedules = deployment.get("schedules", [])
    if not isinstance(schedules, list):
        raise ValueError(f"{FILE}: {where}: schedules is no list")
    deployment["schedules"] = [_mapping(entry, f"{where}: schedule") for entry in schedules]
    if deployment.get("schedule"):  # what Prefect 2 called it
        deployment["schedule"] = _mapping(deployment["schedule"], f"{where}: schedule")
    given = list(filter(None, (*deployment["schedules"], deployment.get("schedule"))))
    slugs = [schedule["slug"] for schedule in given if schedule.get("slug")]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ValueError(f"{FILE}: {where}: two schedules have the slug {', '.join(twice)}; rename one")
    due = []
    for schedule in given:
        schedule["parameters"] = _parameters(schedule, where)
        _check_settings(deployment["parameters"] | schedule["parameters"], where)
        due += _due(schedule, f"{where}: schedule")
    return due


def _work_pool(deployment: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With a name: by default Prefect's default pool, or else `finercut`."""
    pool = _mapping(deployment.get("work_pool", {}), f"{where}: work_pool")
    default = get_current_settings().deployments.default_work_pool_name or POOL
    name = _name(pool.get("name", default), f"{where}: work_pool has a name that is no text")
    _check(f"{where}: work_pool", WorkPoolCreate.model_validate, {"name": name, "type": "process"})
    return pool | {"name": name}


def _due(schedule: dict[str, Any], where: str) -> list[Due]:
    """When a schedule is due next, if it is on; nothing where Prefect puts values in later."""
    if _is_template(schedule):
        return []
    kinds = [kind for kind in _SCHEDULES if kind in schedule]
    if len(kinds) != 1:
        raise ValueError(f"{FILE}: {where}: give one of {', '.join(_SCHEDULES)}, not {' and '.join(kinds) or 'none'}")
    (kind,) = kinds
    form, others = _SCHEDULES[kind]
    if unknown := sorted(map(str, schedule.keys() - others - _OF_EVERY_SCHEDULE - {kind})):
        raise ValueError(f"{FILE}: {where}: a schedule by {kind} has no {', '.join(unknown)}")
    anchor = schedule.get("anchor_date")
    if isinstance(anchor, date):  # YAML makes one of 2026-01-01, and Prefect wants a time
        schedule["anchor_date"] = anchor.isoformat() if isinstance(anchor, datetime) else f"{anchor}T00:00:00Z"
    described = {name: schedule[name] for name in (kind, "timezone", *others) if name in schedule}
    if str(schedule[kind]).startswith("{"):  # a recurrence rule may be JSON with a time zone of its own
        described |= _check(where, json.loads, schedule[kind])
    read_schedule = _check(where, form.model_validate, described)
    if not _check(f"{where}: active", TypeAdapter(bool).validate_python, schedule.get("active", True)):
        return []
    what = f"{kind} {schedule[kind]}"
    try:
        dates = asyncio.run(read_schedule.get_dates(n=2))
    except ValueError:  # a day that never comes, such as 30 February
        dates = []
    if not dates:
        raise ValueError(f"{FILE}: {where}: {what} is never due; correct it, or set active: false")
    if dates[-1] - dates[0] < _LEAST_PAUSE and len(dates) == 2:
        seconds = " (seconds are the last of six fields)" if kind == "cron" and len(schedule[kind].split()) == 6 else ""
        raise ValueError(f"{FILE}: {where}: {what} is due at {dates[0]} and {dates[1]}: a run takes longer{seconds}")
    return [Due(what, dates[0])]


def _check(where: str, parse: Callable[[Any], Any], value: object) -> Any:
    """What `parse` makes of it.

    Raises:
        ValueError: one line that says where and what is wrong.
    """
    try:
        return parse(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = [where, ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")]
        raise ValueError(f"{FILE}: {': '.join(filter(None, place))}") from error
    except ValueError as error:
        raise ValueError(f"{FILE}: {where}: {error}") from error


def _is_template(value: object) -> bool:
    """Whether the environment, or a block of Prefect's server, has a part of it."""
    return "{{" in str(value)


def _name(given: object, lacking: str) -> str:
    """With the values of environment variables, as Prefect will put them in."""
    if not isinstance(given, str) or not given:
        raise ValueError(f"{FILE}: {lacking}")
    name = apply_values({"name": given}, dict(os.environ), remove_notset=False)["name"]
    if _is_template(name):
        raise ValueError(f"{FILE}: {given} is not set in this environment")
    return name


def _mapping(entry: object, where: str) -> dict[str, Any]:
    """Without what is empty, which Prefect refuses in some places."""
    if not isinstance(entry, dict):
        raise ValueError(f"{FILE}: {where} is no mapping")
    return {key: value for key, value in entry.items() if value is not None}


def _parameters(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{FILE}: {where}: parameters is no mapping")
    schema = parameter_schema(compress)  # anew, as it names the params files that are here
    known = schema.properties
    if unknown := sorted(str(name) for name in parameters if name not in known):
        raise ValueError(f"{FILE}: {where}: no parameter {', '.join(unknown)}; there are {', '.join(known)}")
    # Where null is no value, it is the default.
    parameters = {n: value for n, value in parameters.items() if value is not None or known[n].get("default") is None}
    plain = {name: value for name, value in parameters.items() if not _is_template(value)}
    for problem in validate(plain, schema.model_dump_for_openapi(), ignore_required=True):
        field = problem.json_path.removeprefix("$.")
        raise ValueError(f"{FILE}: {where}: parameter {field}: {problem.message}")
    if accelerator := plain.get("accelerator"):
        limit = {"name": accelerator, "limit": 1}
        _check(f"{where}: parameter accelerator", GlobalConcurrencyLimitCreate.model_validate, limit)
    return parameters


def _check_settings(parameters: Mapping[str, Any], where: str) -> None:
    """Overrides and budgets, where the last commit here has the params file: the worker's clone may have another."""
    if _is_template(parameters):
        return
    file, overrides = parameters.get("params_file"), parameters.get("overrides") or {}
    if overrides and not file:
        raise ValueError(f"{FILE}: {where}: overrides need a params_file to start from")
    if file and settings.is_committed(file):
        _check(where, lambda changes: settings.committed(file, changes), overrides)
    if budgets := parameters.get("budgets"):
        _check(where, lambda amounts: settings.budget_amounts(amounts, parameters.get("unit") or "parameters"), budgets)
