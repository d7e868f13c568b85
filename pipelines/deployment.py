"""Declares the deployments of prefect.yaml on a Prefect server, with their work pools, limits and alerts."""

from __future__ import annotations

import json
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
from prefect.events.schemas.automations import Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.settings import get_current_settings

from finercut.system import yaml_files

from . import prefect_yaml
from .flow import compress

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
        FileNotFoundError, ValueError: as `prefect_yaml.read`, or `webhook` is no address. Nothing is declared.
        RuntimeError: Prefect refused prefect.yaml (the message is its last line), or the server does not answer.
    """
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise ValueError("the webhook of alerts is no address that begins with http:// or https://")
    document, due = prefect_yaml.read()
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
            *(line for name, schedules in due.items() for line in _told(name, schedules)),
            *(f"work pool    {name}" for name in sorted(pools)),
            *(f"accelerator  {name}, one run at a time" for name in sorted(accelerators)),
            *(f"automation   {automation.name}" for automation in automations),
        ]
    )


@contextmanager
def _server_errors() -> Iterator[None]:
    """Raise what Prefect's client does as RuntimeErrors of one line."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        where = get_current_settings().api.url or "the server started for this command"
        raise RuntimeError(f"Prefect at {where}: {error or type(error).__name__}") from error


def _told(name: str, schedules: Iterable[prefect_yaml.Due]) -> list[str]:
    planned = [f"schedule     {what}, next at {at:%Y-%m-%d %H:%M:%S %Z}" for what, at in schedules]
    return [f"deployment   {compress.name}/{name}", *planned]


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
        file = Path(folder) / prefect_yaml.FILE.name
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
        return next((line for line in reversed(lines) if "further information" not in line), lines[-1])
    told = takewhile(lambda line: not re.search("further information|exception occurred", line), lines[raised[-1] :])
    return " ".join(told).partition(": ")[2][:400]


def _declared(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(f"{compress.name}/{name}")
    except ObjectNotFound as error:
        raise RuntimeError(
            f"Prefect took no deployment {name} from {prefect_yaml.FILE}; `prefect deploy --name {name}` says why"
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
