"""What `finercut deploy` declares on a Prefect server: prefect.yaml, what it names, and alerts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.automations import Automation, AutomationCore, CallWebhook, ChangeFlowRunState, DoNothing, EventTrigger
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from pipelines.flow import compress

PREFECT_YAML = Path("prefect.yaml")
WEBHOOK_BLOCK = "finercut-alerts"
# Three times as long as a run lets pass between saying that it is alive (PREFECT_FLOWS_HEARTBEAT_FREQUENCY), and a bit.
SILENCE = timedelta(minutes=10)
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")}
# `text` is what Slack and its likes show.
ALERT = json.dumps(
    {
        "text": "finercut: {{ flow_run.name }} is {{ flow_run.state.name }}",
        "deployment": "{{ deployment.name }}",
        "url": "{{ flow_run|ui_url }}",
    }
)


def deploy(webhook: str | None = None) -> str:
    """Create or update everything; what was done, a line each.

    Args:
        webhook: an address that alerts are posted to; without one they are only events in Prefect's own feed

    Raises:
        ValueError: prefect.yaml has parameters that the flow has not; nothing is declared.
        RuntimeError: Prefect refused prefect.yaml; the message is its last line.
    """
    deployments = yaml.safe_load(PREFECT_YAML.read_text(encoding="utf-8"))["deployments"]
    for deployment in deployments:
        _check_parameters(deployment)
    pools = {deployment["work_pool"]["name"] for deployment in deployments}
    accelerators = {deployment["parameters"]["accelerator"] for deployment in deployments}
    with get_client(sync_client=True) as client:
        _create_pools(client, sorted(pools))
        for name in sorted(accelerators):
            _create_limit(client, name)
        _deploy_all()
        for deployment in deployments:
            _refuse_unknown_parameters(client, deployment["name"])
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


def _create_pools(client: SyncPrefectClient, names: Iterable[str]) -> None:
    """Pools of processes, unless they exist: then they may well be of another type."""
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


def _deploy_all() -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr + done.stdout).strip().splitlines() or ["no output"]
        raise RuntimeError(f"prefect deploy: {told[-1]}")


def _check_parameters(deployment: dict) -> None:
    given = [
        deployment["parameters"],
        *(schedule.get("parameters", {}) for schedule in deployment.get("schedules", [])),
    ]
    known = compress.parameters.properties
    if unknown := sorted({name for names in given for name in names} - set(known)):
        raise ValueError(
            f"{PREFECT_YAML}: deployment {deployment['name']}: no parameter {', '.join(unknown)}; "
            f"there are {', '.join(known)}"
        )


def _refuse_unknown_parameters(client: SyncPrefectClient, name: str) -> None:
    """Let the server refuse a run with a parameter that the flow has not; its own schema would let it begin."""
    deployment = client.read_deployment_by_name(f"{compress.name}/{name}")
    schema = deployment.parameter_openapi_schema | {"additionalProperties": False}
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
    """Calls a run crashed that was killed together with whatever would have reported it."""
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
