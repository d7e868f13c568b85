"""Declares the deployments of prefect.yaml on a Prefect server, with their work pools, limits and alerts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
from prefect.automations import Automation, AutomationCore, CallWebhook, ChangeFlowRunState, DoNothing, EventTrigger
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.events.schemas.automations import Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values
from pydantic import TypeAdapter, ValidationError

from finercut.system import yaml_files

from .flow import compress

PREFECT_YAML = Path("prefect.yaml")
# Of deployments that name none.
ENTRYPOINT = f"{__package__}.flow.compress"
POOL = "finercut"
WEBHOOK_BLOCK = "finercut-alerts"
# A little over three heartbeats of a run (PREFECT_FLOWS_HEARTBEAT_FREQUENCY).
SILENCE = timedelta(minutes=10)
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")}
# Slack and similar services show `text`.
ALERT = json.dumps(
    {
        "text": "finercut: {{ flow_run.name }} is {{ flow_run.state.name }}",
        "deployment": "{{ deployment.name }}",
        "url": "{{ flow_run|ui_url }}",
    }
)


def deploy(webhook: str | None = None) -> str:
    """Create or update everything; returns what was done, a line each.

    Args:
        webhook: an address that alerts are posted to; without one they are only events in Prefect's own feed

    Raises:
        FileNotFoundError: there is no prefect.yaml.
        ValueError: prefect.yaml has no deployments, one without a name, parameters that the flow does not have or take,
            or a schedule that is none; or `webhook` is no address. Nothing is declared.
        RuntimeError: Prefect refused prefect.yaml (the message is its last line), or the server does not answer.
    """
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise ValueError("the webhook of alerts is no address that begins with http:// or https://")
    document = _read()
    deployments = document["deployments"]
    pools = {deployment["work_pool"]["name"] for deployment in deployments}
    with _server_errors(), get_client(sync_client=True) as client:
        _create_pools(client, sorted(pools))
        _deploy_all(document)
        accelerators = set()
        for deployment in deployments:
            declared = _declared(client, deployment["name"])
            _complete_form(client, declared)
            accelerators |= _accelerators(declared)
        for name in sorted(accelerators):
            _create_limit(client, name)
        automations = [_alert(_webhook_action(webhook)), _lost_runs()]
        for automation in automations:
            _put(client, automation)
    return "\n".join(
        [
            *(f"deployment   {compress.name}/{deployment['name']}" for deployment in deployments),
            *(f"work pool    {name}" for name in sorted(pools)),
            *(f"accelerator  {name}, one run at a time" for name in sorted(accelerators)),
            *(f"automation   {automation.name}" for automation in automations),
        ]
    )


def _read() -> dict[str, Any]:
    """prefect.yaml, with the defaults of what it leaves out or empty, so that Prefect asks for nothing.

    The work pool is Prefect's default one, or else `finercut`.
    """
    if not PREFECT_YAML.is_file():
        raise FileNotFoundError(f"no {PREFECT_YAML} here; run from the project's root")
    document = yaml_files.read(PREFECT_YAML, version="1.1")
    found = document.get("deployments") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{PREFECT_YAML}: `deployments` is no list of deployments; give at least one")
    deployments = [_complete(entry, number) for number, entry in enumerate(found, start=1)]
    names = [deployment["name"] for deployment in deployments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{PREFECT_YAML}: two deployments are called {', '.join(twice)}; rename one")
    return document | {"deployments": deployments}


def _complete(entry: object, number: int) -> dict[str, Any]:
    deployment = _mapping(entry, f"deployment {number}")
    name = deployment["name"] = _name(deployment.get("name"), f"deployment {number} has no name")
    where = f"deployment {name}"
    deployment["parameters"] = _parameters(deployment, where)
    deployment.setdefault("entrypoint", ENTRYPOINT)
    pool = _mapping(deployment.get("work_pool", {}), f"{where}: work_pool")
    default = get_current_settings().deployments.default_work_pool_name or POOL
    pool_name = _name(pool.get("name", default), f"{where}: work_pool has a name that is no text")
    deployment["work_pool"] = pool | {"name": pool_name}
    schedules = deployment.get("schedules", [])
    if not isinstance(schedules, list):
        raise ValueError(f"{PREFECT_YAML}: {where}: schedules is no list")
    deployment["schedules"] = [_mapping(entry, f"{where}: schedule") for entry in schedules]
    if deployment.get("schedule"):  # what Prefect 2 called it
        deployment["schedule"] = _mapping(deployment["schedule"], f"{where}: schedule")
    for schedule in filter(None, (*deployment["schedules"], deployment.get("schedule"))):
        schedule["parameters"] = _parameters(schedule, where)
        _check_schedule(schedule, f"{PREFECT_YAML}: {where}: schedule")
    return deployment


# As Prefect reads them, each with what else may be given.
_SCHEDULES = {
    "cron": (CronSchedule, {"day_or"}),
    "interval": (IntervalSchedule, {"anchor_date"}),
    "rrule": (RRuleSchedule, set()),
}
_OF_EVERY_SCHEDULE = {"timezone", "active", "parameters", "slug", "replaces"}


def _check_schedule(schedule: Mapping[str, Any], where: str) -> None:
    """What Prefect would find when others are declared already, or say in a traceback."""
    if _is_template(schedule):
        return
    kinds = [kind for kind in _SCHEDULES if kind in schedule]
    if len(kinds) != 1:
        raise ValueError(f"{where}: give one of {', '.join(_SCHEDULES)}, not {' and '.join(kinds) or 'none'}")
    (kind,) = kinds
    form, others = _SCHEDULES[kind]
    if unknown := sorted(map(str, schedule.keys() - others - _OF_EVERY_SCHEDULE - {kind})):
        raise ValueError(f"{where}: a schedule by {kind} has no {', '.join(unknown)}")
    if str(schedule[kind]).startswith("{"):  # a recurrence rule may be JSON with a time zone of its own
        return
    try:
        form.model_validate({name: schedule[name] for name in (kind, "timezone", *others) if name in schedule})
        TypeAdapter(bool).validate_python(schedule.get("active", True))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "active"
        raise ValueError(f"{where}: {field}: {problem['msg'].removeprefix('Value error, ')}") from error


def _is_template(value: object) -> bool:
    """Whether the environment, or a block of Prefect's server, has a part of it."""
    return "{{" in str(value)


def _name(given: object, lacking: str) -> str:
    """With the values of environment variables, as Prefect will put them in."""
    if not isinstance(given, str) or not given:
        raise ValueError(f"{PREFECT_YAML}: {lacking}")
    name = apply_values({"name": given}, dict(os.environ), remove_notset=False)["name"]
    if _is_template(name):
        raise ValueError(f"{PREFECT_YAML}: {given} is not set in this environment")
    return name


def _mapping(entry: object, where: str) -> dict[str, Any]:
    """Without what is empty, which Prefect refuses in some places."""
    if not isinstance(entry, dict):
        raise ValueError(f"{PREFECT_YAML}: {where} is no mapping")
    return {key: value for key, value in entry.items() if value is not None}


def _parameters(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{PREFECT_YAML}: {where}: parameters is no mapping")
    schema = parameter_schema(compress)  # anew, as it names the params files that are here
    known = schema.properties
    if unknown := sorted(str(name) for name in parameters if name not in known):
        raise ValueError(f"{PREFECT_YAML}: {where}: no parameter {', '.join(unknown)}; there are {', '.join(known)}")
    # Where null is no value, it is the default.
    parameters = {n: value for n, value in parameters.items() if value is not None or known[n].get("default") is None}
    plain = {name: value for name, value in parameters.items() if not _is_template(value)}
    for problem in validate(plain, schema.model_dump_for_openapi(), ignore_required=True):
        field = problem.json_path.removeprefix("$.")
        raise ValueError(f"{PREFECT_YAML}: {where}: parameter {field}: {problem.message}")
    return parameters


@contextmanager
def _server_errors() -> Iterator[None]:
    """Raise what Prefect's client does as RuntimeErrors of one line."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        where = get_current_settings().api.url or "the server started for this command"
        raise RuntimeError(f"Prefect at {where}: {error or type(error).__name__}") from error


def _create_pools(client: SyncPrefectClient, names: Iterable[str]) -> None:
    """Create pools of processes, leaving those that exist, which can be of another type."""
    for name in names:
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        except ObjectAlreadyExists:
            continue


def _create_limit(client: SyncPrefectClient, name: str) -> None:
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))


def _deploy_all(document: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PREFECT_YAML.name
        file.write_text(yaml_files.dump(document, version="1.1"), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr + done.stdout
    if done.returncode or "Skipping deployment configuration" in said:
        raise RuntimeError(f"prefect deploy: {_reason(said)}")


def _reason(said: str) -> str:
    """The error that Prefect's output is about: what it lists, the end of its last traceback, or its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no output"]
    if listed := [line.removeprefix("• ") for line in lines if line.startswith("• ")]:
        return f"invalid fields: {'; '.join(listed)}"
    raised = [n for n, line in enumerate(lines) if re.match(r"[\w.]+(?:Error|Exception|Exists|NotFound): ", line)]
    if not raised:
        return lines[-1]
    told = takewhile(lambda line: not re.search("further information|exception occurred", line), lines[raised[-1] :])
    return " ".join(told).partition(": ")[2][:400]


def _declared(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(f"{compress.name}/{name}")
    except ObjectNotFound as error:
        raise RuntimeError(
            f"Prefect took no deployment {name} from {PREFECT_YAML}; `prefect deploy --name {name}` says why"
        ) from error


def _accelerators(deployment: DeploymentResponse) -> set[str]:
    """The concurrency limits that its runs name, by their parameters or by those of a schedule."""
    given = [deployment.parameters, *(schedule.parameters for schedule in deployment.schedules)]
    return {name for parameters in given if (name := parameters.get("accelerator"))}


def _complete_form(client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
    """Give the form titles in words, and let the server refuse a parameter that the flow does not have.

    Prefect's own schema names the arguments, and would let a run with others begin.
    """
    schema = deployment.parameter_openapi_schema | {"additionalProperties": False}
    schema["properties"] = {
        name: field | {"title": name.replace("_", " ").capitalize()} for name, field in schema["properties"].items()
    }
    client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))


def _alert(action: CallWebhook | DoNothing) -> AutomationCore:
    return AutomationCore(
        name="finercut: a run failed, crashed or is late",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut", "Late")},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": compress.name},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[action],
    )


def _lost_runs() -> AutomationCore:
    """Marks a run as crashed that was killed together with whatever would have reported it."""
    heartbeat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name="finercut: a run that went silent has crashed",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat} | ENDED,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": compress.name},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="its machine went silent")],
    )


def _webhook_action(url: str | None) -> CallWebhook | DoNothing:
    if url is None:
        return DoNothing()
    block_id = Webhook(url=url).save(WEBHOOK_BLOCK, overwrite=True)
    return CallWebhook(block_document_id=block_id, payload=ALERT)


def _put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    for found in client.read_automations_by_name(automation.name):
        client.update_automation(found.id, automation)
        return
    Automation(**automation.model_dump()).create()
