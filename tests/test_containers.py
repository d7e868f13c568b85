"""What is known of the container files without a container engine; trials/dockerfile.py carries the Dockerfile out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import dockerfile
import pytest
import servers
import yaml
from compose_spec import PyOptions

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]


def tool(name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).parent / name, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_the_linters_have_nothing_to_say():
    said = tool("hadolint", "--failure-threshold", "warning", "Dockerfile")
    assert said.returncode == 0, said.stdout
    said = tool("compose-lint", "--fail-on", "high", "compose.yaml")
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("file", ["compose.yaml", "docker/gpu.yaml"])
def test_compose_files_follow_the_specification(file):
    # Compose puts variables in before it reads anything else
    text = re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", r"\1", (ROOT / file).read_text())
    PyOptions(apply_merge=True).from_yaml(text).validate()


@pytest.mark.parametrize("hardware", ["cpu", "cuda"])
def test_the_worker_runs_as_a_numbered_user_without_secrets(hardware):
    arguments = {"HARDWARE": hardware}
    steps = dockerfile.chain(DOCKERFILE, "worker", arguments)
    assert [argument for keyword, argument in steps if keyword == "USER"][-1] == "10001"
    installs = [argument for keyword, argument in steps if keyword == "RUN" and "requirements/install" in argument]
    assert [install.partition(" &&")[0].split()[-1] for install in installs] == ["lock", "project"]
    assert all("--mount=type=secret" in install for install in installs)
    assert "g++" in str(steps)  # without it, vLLM starts no model
    assert ("NVIDIA_VISIBLE_DEVICES" in str(steps)) == (hardware == "cuda")
    settings = " ".join(argument for keyword, argument in steps if keyword in ("ENV", "ARG"))
    assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY", settings)


def test_the_context_is_what_is_named_and_no_more(tmp_path, monkeypatch):
    for name in (
        "README.md",
        "finercut/a.py",
        "finercut/__pycache__/a.pyc",
        ".env",
        ".dvc/config",
        ".dvc/config.local",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(dockerfile, "PROJECT", tmp_path)
    seen = dockerfile.context_files((ROOT / ".dockerignore").read_text())
    assert sorted(map(str, seen)) == [".dvc/config", "README.md", "finercut/a.py"]


def test_ports_are_bound_to_this_machine_and_passwords_have_no_defaults():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    secret = re.findall(r"\$\{(\w*(?:PASSWORD|KEY))([^}]*)\}", COMPOSE)
    assert {name for name, _ in secret} == {
        "POSTGRES_PASSWORD",
        "MLFLOW_DB_PASSWORD",
        "PREFECT_DB_PASSWORD",
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
        "MLFLOW_S3_ACCESS_KEY",
        "MLFLOW_S3_SECRET_KEY",
        "WORKER_S3_ACCESS_KEY",
        "WORKER_S3_SECRET_KEY",
    }
    assert {default for _, default in secret} == {":?"}  # required, and none given


def test_every_service_starts_after_what_it_needs_is_healthy():
    conditions = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    for needed in (needed for wanted in conditions.values() for needed in wanted.items()):
        name, how = needed
        ends_by_itself = SERVICES[name].get("restart") == "no"
        assert how["condition"] == ("service_completed_successfully" if ends_by_itself else "service_healthy")
        assert ends_by_itself or "healthcheck" in SERVICES[name]
    assert set(conditions["worker"]) == {"deploy", "mlflow"}
    assert set(conditions["mlflow"]) == {"postgres", "buckets"}
    assert SERVICES["worker"]["build"]["target"] == "worker"  # whose image has a HEALTHCHECK
    assert any(keyword == "HEALTHCHECK" for keyword, _ in dockerfile.chain(DOCKERFILE, "worker", {}))


def test_an_empty_workspace_becomes_a_repository_of_the_images_files_and_a_clone_stays_as_it_is(tmp_path):
    image, empty, clone = (tmp_path / name for name in ("image", "empty", "clone"))
    for directory in (image / "docker", image / ".dvc", image / ".venv", empty, clone):
        directory.mkdir(parents=True)
    (image / "docker/in-workspace").write_text((ROOT / "docker/in-workspace").read_text())
    (image / "docker/in-workspace").chmod(0o755)
    (image / "params.yaml").write_text("of the image")
    (image / ".gitignore").write_text("/.finercut/\n")
    (image / ".venv/python").touch()
    (empty / "lost+found").mkdir()  # of a volume's file system
    subprocess.run("git init -q && echo mine > params.yaml", shell=True, cwd=clone, check=True)

    def inside(workspace, *command):
        environment = os.environ | {"FINERCUT_WORKSPACE": str(workspace)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.run(
            [image / "docker/in-workspace", *command], env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert inside(empty, "git", "ls-files").split() == [".gitignore", "docker/in-workspace", "params.yaml"]
    (empty / "params.yaml").write_text("changed since")
    assert inside(empty, "cat", "params.yaml") == "changed since"  # the same image: nothing is unpacked over it
    (image / "params.yaml").write_text("of a newer image")
    (empty / "finercut/rooms").mkdir(parents=True)
    (empty / "finercut/rooms/moved.py").write_text("of an older image")
    (empty / "results").write_text("stay")
    assert inside(empty, "git", "show", "HEAD:params.yaml") == "of a newer image"
    assert (empty / "results").read_text() == "stay"
    assert not (empty / "finercut").exists()
    assert inside(empty, "git", "rev-list", "--count", "HEAD") == "2\n"
    assert inside(clone, "cat", "params.yaml") == "mine\n"


def test_containers_that_start_at_once_make_one_workspace(tmp_path):
    image, workspace = tmp_path / "image", tmp_path / "workspace"
    for folder in (image / "docker", workspace):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "docker/in-workspace", image / "docker")
    shutil.copy(ROOT / ".gitignore", image)
    for number in range(200):  # git takes a while for them
        (image / f"{number}.py").write_text(str(number))
    environment = os.environ | {"FINERCUT_WORKSPACE": str(workspace)}
    command = [image / "docker/in-workspace", "git", "status", "--porcelain"]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    assert [container.communicate(timeout=120)[0] for container in started] == [""] * 4
    assert [container.returncode for container in started] == [0] * 4
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=workspace, capture_output=True, text=True)
    assert count.stdout == "1\n"


def test_the_health_check_tells_200_from_anything_else():
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    said = [
        subprocess.run([ROOT / "docker/healthy", url], check=False, capture_output=True).returncode
        for url in (f"{address}/health", f"{address}/broken", "http://127.0.0.1:9/health")
    ]
    server.shutdown()
    assert said[0] == 0
    assert all(said[1:])


def test_mlflow_and_prefect_each_own_a_database_and_cannot_enter_the_other():
    with servers.postgres(()) as server:
        passwords = {"MLFLOW_DB_PASSWORD": "canary1", "PREFECT_DB_PASSWORD": "canary2"}
        environment = os.environ | server.environment | passwords
        subprocess.run([ROOT / "docker/databases.sh"], env=environment, check=True, capture_output=True)

        def enters(user, password, database):
            address = f"postgresql://{user}:{password}@{server.address}/{database}"
            command = ["psql", "-qtA", "-d", address, "-c", "create table mine (); select current_user"]
            return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

        assert enters("mlflow", "canary1", "mlflow").stdout == "mlflow\n"
        assert enters("prefect", "canary2", "prefect").stdout == "prefect\n"
        assert "permission denied for database" in enters("mlflow", "canary1", "prefect").stderr
        assert "password authentication failed" in enters("mlflow", "canary2", "mlflow").stderr


def test_buckets_are_created_once(s3_store):
    command = [sys.executable, ROOT / "docker/create_buckets.py", "dvc", "new-bucket:somebody"]
    for _ in range(2):
        subprocess.run(command, env=os.environ | s3_store.environment, check=True)
    assert {"dvc", "new-bucket"} <= {bucket["Name"] for bucket in s3_store.client().list_buckets()["Buckets"]}
    statements = json.loads(s3_store.client().get_bucket_policy(Bucket="new-bucket")["Policy"])["Statement"]
    assert [statement["Principal"] for statement in statements] == [{"AWS": ["somebody"]}] * 2
    assert [statement["Resource"] for statement in statements] == [
        ["arn:aws:s3:::new-bucket"],
        ["arn:aws:s3:::new-bucket/*"],
    ]
    allowed = {action for statement in statements for action in statement["Action"]}
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} <= allowed
    assert not {action for action in allowed if "*" in action or "Policy" in action or "Acl" in action}


def test_only_what_sets_the_store_up_has_the_administrators_keys():
    holders = {name for name, service in SERVICES.items() if "{S3_SECRET_KEY" in str(service)}
    assert holders == {"s3", "users", "buckets"}
    users = {name: SERVICES[name]["environment"]["AWS_ACCESS_KEY_ID"] for name in ("mlflow", "worker")}
    assert users == {"mlflow": "${MLFLOW_S3_ACCESS_KEY:?}", "worker": "${WORKER_S3_ACCESS_KEY:?}"}
    assert SERVICES["buckets"]["command"][-2:] == [
        "dvc:${WORKER_S3_ACCESS_KEY:?}",
        "mlflow:${MLFLOW_S3_ACCESS_KEY:?}",
    ]


def test_the_stores_users_are_made_or_given_their_secrets_anew(tmp_path):
    """A stand-in for the gateway's command, which knows one of the two users already."""
    gateway = tmp_path / "versitygw"
    gateway.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *"create-user --access mlflow"*) exit 1;; esac\n')
    gateway.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MLFLOW_S3_ACCESS_KEY": "mlflow",
        "MLFLOW_S3_SECRET_KEY": "m",
        "WORKER_S3_ACCESS_KEY": "worker",
        "WORKER_S3_SECRET_KEY": "w",
    }
    script = ROOT / "docker/create_users.sh"
    subprocess.run(["sh", script, "MLFLOW", "WORKER"], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "admin create-user --access mlflow --secret m --role user",
        "admin update-user --access mlflow --secret m",
        "admin create-user --access worker --secret w --role user",
    ]


def test_code_and_environment_of_an_image_belong_to_root():
    for target in ("worker", "servers"):
        steps = dockerfile.chain(DOCKERFILE, target, {"HARDWARE": "cpu"})
        user = next(n for n, (keyword, argument) in enumerate(steps) if (keyword, argument) == ("USER", "10001"))
        assert not any(keyword in ("COPY", "RUN") for keyword, _ in steps[user:])
        assert not any("--chown" in argument for keyword, argument in steps if keyword == "COPY")
        given = [argument for _, argument in steps if "--owner" in argument or "chown" in argument]
        assert all("/opt" not in argument for argument in given)


def test_the_images_code_is_compiled_as_nobody_can_write_beside_it_later():
    (install,) = [a for k, a in dockerfile.chain(DOCKERFILE, "worker", {"HARDWARE": "cpu"}) if a.endswith("pipelines")]
    assert "compileall" in install.partition("requirements/install")[2]


def test_the_dockerfiles_trial_copies_as_copy_does(tmp_path):
    image = dockerfile.Chroot(tmp_path, [], {})
    image.apply("WORKDIR", "/opt/finercut")
    image.apply("COPY", "docker docker")
    image.apply("COPY", ". .")
    assert (tmp_path / "opt/finercut/docker/in-workspace").stat().st_mode & 0o111
    assert (tmp_path / "opt/finercut/pipelines/cli.py").read_text() == (ROOT / "pipelines/cli.py").read_text()
    assert not (tmp_path / "opt/finercut/tests").exists()
