"""Registers versions with their evidence; looks up, downloads and deletes them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property, partial
from importlib.metadata import version as installed_version
from pathlib import Path

from mlflow import MlflowClient, artifacts, pyfunc, set_tracking_uri
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from finercut.registry.runs import Run
from finercut.registry.server import check_place, impatient, mlflow_errors, reach_database, tracking_uri

logger = logging.getLogger("finercut")

CHALLENGER = "challenger"
CHECKPOINT = "checkpoint"
"""Folder of a version with the pruned model."""
# A version has it from the moment it exists, and exists only once everything is uploaded.
PRUNED_MD5 = "finercut.pruned_md5"
# Of registered models that have none.
DESCRIPTION = (
    "Versions of one model that finercut pruned, each with its checkpoint and all evidence. `challenger` is the newest "
    "that passed the gate, `champion` the one that was promoted; `finercut status` says why others were not."
)
# Characters of a description: the column of MLflow's database.
LONGEST_DESCRIPTION = 5000


@dataclass(frozen=True)
class VersionReference:
    """A version by its number or by an alias."""

    name: str
    wanted: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}{'/' if self.wanted.isdecimal() else '@'}{self.wanted}"

    @classmethod
    def parse(cls, uri: str) -> VersionReference:
        """
        Raises:
            ValueError: not `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        """
        match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
        if match is None:
            raise ValueError(f"{uri!r} names no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
        return cls(match[1], match[2] or match[3])


def connect(name: str, *, must_exist: bool = True) -> MlflowClient:
    """A client of the registry that MLFLOW_TRACKING_URI names.

    Raises:
        RuntimeError: it has no model `name`, which `must_exist`; or does not answer within seconds.
    """
    set_tracking_uri(tracking_uri())
    with mlflow_errors(f"find {name}"), impatient():
        reach_database()
        client = MlflowClient()
        check_place(client)
        if must_exist:
            client.get_registered_model(name)
        else:
            client.search_registered_models(max_results=1)
    return client


def find(client: MlflowClient, reference: VersionReference) -> ModelVersion:
    """
    Raises:
        RuntimeError: there is none.
    """
    name, wanted = reference.name, reference.wanted
    with mlflow_errors(f"find {reference.uri}"):
        number = wanted if wanted.isdecimal() else client.get_model_version_by_alias(name, wanted).version
        # By its alias, MLflow gives a version without its aliases.
        return client.get_model_version(name, str(number))


def is_finercuts(version: ModelVersion) -> bool:
    """Whether finercut registered it, or it is a copy of such a version. Others carry no evidence."""
    return PRUNED_MD5 in version.tags


def every(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Newest first."""
    with mlflow_errors(f"list the versions of {name}"):
        found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def download(version: ModelVersion, folder: str, directory: Path) -> Path:
    """Download one folder of a version; MLflow refuses names that would lead out of `directory`.

    Args:
        folder: `evidence` or `checkpoint`

    Raises:
        RuntimeError: there is no such folder, or the download fails.
    """
    uri = f"models:/{version.name}/{version.version}/{folder}"
    with mlflow_errors(f"download {uri}"):
        return Path(artifacts.download_artifacts(uri, dst_path=str(directory)))


@dataclass(frozen=True)
class Stored:
    """The files of a logged model, through whatever store or server keeps them."""

    address: str

    @cached_property
    def repository(self) -> ArtifactRepository:
        return get_artifact_repository(self.address)

    def n_bytes(self, folder: str | None = None) -> int:
        """Of `folder`, or of everything; 0 if it is not there."""
        with mlflow_errors("list stored files"):
            return self._n_bytes(folder)

    def _n_bytes(self, folder: str | None) -> int:
        listed = self.repository.list_artifacts(folder)
        return sum(self._n_bytes(file.path) if file.is_dir else file.file_size or 0 for file in listed)

    def delete(self, folder: str | None = None) -> None:
        """Delete `folder`, or everything."""
        with mlflow_errors("delete stored files"):
            for path in [folder] if folder else [file.path for file in self.repository.list_artifacts()]:
                self.repository.delete_artifacts(path)


def stored(client: MlflowClient, version: ModelVersion) -> Stored | None:
    """The files that belong to this version alone.

    None where there are none: it was not made from a logged model, as a copy of another version, or that was deleted.
    """
    model_id = _logged_model(version)
    if model_id is None:
        return None
    with mlflow_errors(f"find the files of {version.name} version {version.version}"):
        try:
            return Stored(client.get_logged_model(model_id).artifact_location)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def _copied(client: MlflowClient) -> set[str]:
    """Where the files are that copied versions refer to, in the whole registry."""
    found, token = set(), ""
    while token is not None:
        page = client.search_model_versions(page_token=token or None)
        copied = (version for version in page if re.fullmatch(r"models:/[^/]+/\d+", version.source or ""))
        found |= {client.get_model_version_download_uri(version.name, version.version) for version in copied}
        token = page.token or None
    return found


def copies(client: MlflowClient, version: ModelVersion) -> list[str]:
    """Versions of this or another model that were copied from this one: MLflow refers to its files and copies none."""
    with mlflow_errors(f"look for copies of {version.name} version {version.version}"):
        found = client.search_model_versions(f"source_path = 'models:/{version.name}/{version.version}'")
    return [f"{copy.name} version {copy.version}" for copy in found]


def _logged_model(version: ModelVersion) -> str | None:
    """The id of the logged model that the version was made from."""
    match = re.fullmatch(r"models:/(m-[^/@]+)", version.source or "")
    return match and match[1]


def unregistered(client: MlflowClient, experiment: str, name: str, before: datetime) -> Iterator[tuple[str, Stored]]:
    """Uploads for `name` that began before `before` and that no version of any model was made from: ids and files."""
    with mlflow_errors(f"list the uploads for {name}"):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return
        registered = set(map(_logged_model, every(client, name)))
        copied = cache(partial(_copied, client))  # the whole registry: asked only where an upload would go
        token = ""
        while token is not None:
            page = client.search_logged_models([found.experiment_id], f"name = '{name}'", page_token=token or None)
            for model in page:
                if model.model_id in registered or model.creation_timestamp >= before.timestamp() * 1000:
                    continue
                # Somebody may have registered it by hand, under another name, or copied a version that is no more.
                of_any = f"source_path = 'models:/{model.model_id}'"
                if not client.search_model_versions(of_any, max_results=1) and model.artifact_location not in copied():
                    yield model.model_id, Stored(model.artifact_location)
            token = page.token or None


@dataclass(frozen=True)
class Registered:
    version: str
    model_uri: str


def find_version(run: Run, name: str, pruned_md5: str, collected: Collection[str] = ()) -> Registered | None:
    """The newest version of `name` that holds exactly this checkpoint.

    A version of `collected` holds none any more, nor does one whose logged model was deleted, or its files.
    """
    for found in every(run.client, name):
        if found.tags.get(PRUNED_MD5) != pruned_md5 or str(found.version) in collected:
            continue
        files = stored(run.client, found)
        if _logged_model(found) is None or (files is not None and files.n_bytes()):
            return Registered(str(found.version), f"models:/{name}/{found.version}")
        logger.warning("%s version %s has lost its files: it is made anew", name, found.version)
    return None


def register(
    run: Run,
    name: str,
    checkpoint: Path,
    evidence: Iterable[Path],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    pruned_md5: str,
    libraries: Mapping[str, str] | None = None,
    description: str = "",
) -> Registered:
    """Make `checkpoint` a new version of `name`.

    The weights are uploaded once, from where they are: nothing is loaded or copied beforehand. The version's folder
    holds `checkpoint/`, `evidence/` (the files given) and a wrapper for `mlflow.pyfunc`.

    Args:
        libraries: versions of torch and transformers that produced the evidence; of others, the installed ones
        description: Markdown; what exceeds LONGEST_DESCRIPTION is cut off
    """
    with mlflow_errors(f"register {name}"):
        model_id = _upload(run, name, checkpoint, evidence, tags, libraries or {})
        run.log_metrics(metrics, model_id)
        return _new_version(run, name, model_id, {**tags, PRUNED_MD5: pruned_md5}, description[:LONGEST_DESCRIPTION])


def challenge(run: Run, name: str, version: str) -> None:
    """Set the alias `challenger` to this version."""
    with mlflow_errors(f"set the alias {CHALLENGER} of {name}"):
        run.client.set_registered_model_alias(name, CHALLENGER, version)


def _upload(
    run: Run,
    name: str,
    checkpoint: Path,
    evidence: Iterable[Path],
    tags: Mapping[str, str],
    libraries: Mapping[str, str],
) -> str:
    model = run.client.create_logged_model(run.experiment_id, name, run.run_id, tags=dict(tags), model_type="causal-lm")
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "model"
            _write_wrapper(small, checkpoint, run.run_id, model.model_id, libraries)
            (small / "evidence").mkdir()
            for path in evidence:
                shutil.copyfile(path, small / "evidence" / path.name)
            run.client.log_model_artifacts(model.model_id, str(small))
        run.client.log_model_artifacts(model.model_id, str(checkpoint), CHECKPOINT)
        status = "READY"
    finally:
        run.client.finalize_logged_model(model.model_id, status)
    return model.model_id


def _write_wrapper(
    directory: Path, checkpoint: Path, run_id: str, model_id: str, measured_with: Mapping[str, str]
) -> None:
    names = ["mlflow", "torch", "transformers"]
    if "quantization_config" in json.loads((checkpoint / "config.json").read_text(encoding="utf-8")):
        names.append("compressed-tensors")  # with which transformers reads them
    libraries = {name: measured_with.get(name) or installed_version(name) for name in names}
    text = Schema([ColSpec("string")])
    with warnings.catch_warnings():
        # It recommends an input example to those who give no signature, but also to those who do.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.")
        pyfunc.save_model(
            path=directory,
            python_model=str(Path(__file__).with_name("served_model.py")),
            mlflow_model=Model(artifact_path=None, run_id=run_id, model_id=model_id),
            signature=ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 64)])),
            pip_requirements=[f"{name}=={_public_version(found)}" for name, found in libraries.items()],
        )


def _public_version(found: str) -> str:
    """Without the local part: a server installs `2.13.0` for its own hardware, not our `2.13.0+cpu`."""
    return found.partition("+")[0]


def _new_version(run: Run, name: str, model_id: str, tags: Mapping[str, str], description: str) -> Registered:
    try:
        run.client.create_registered_model(name, description=DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if not run.client.get_registered_model(name).description:
            run.client.update_registered_model(name, DESCRIPTION)
    created = run.client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run.run_id,
        tags=dict(tags),
        description=description,
        model_id=model_id,
    )
    return Registered(str(created.version), f"models:/{name}/{created.version}")
