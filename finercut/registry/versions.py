"""The door to registered versions: find one, tell what it is, bring its files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mlflow import MlflowClient, artifacts, set_tracking_uri
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from finercut.registry.runs import impatient, mlflow_errors, tracking_uri


@dataclass(frozen=True)
class Reference:
    """A version by its number or by an alias."""

    name: str
    wanted: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}{'/' if self.wanted.isdecimal() else '@'}{self.wanted}"

    @classmethod
    def parse(cls, uri: str) -> Reference:
        """
        Raises:
            ValueError: not `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        """
        match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
        if match is None:
            raise ValueError(f"{uri!r} names no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
        return cls(match[1], match[2] or match[3])


def connect(name: str) -> MlflowClient:
    """A client of the registry that MLFLOW_TRACKING_URI names.

    Raises:
        RuntimeError: it has no model `name`, or does not answer within seconds.
    """
    set_tracking_uri(tracking_uri())
    with mlflow_errors(f"find {name}"), impatient():
        client = MlflowClient()
        client.get_registered_model(name)
    return client


def find(client: MlflowClient, reference: Reference) -> ModelVersion:
    """
    Raises:
        RuntimeError: there is none.
    """
    name, wanted = reference.name, reference.wanted
    with mlflow_errors(f"find {reference.uri}"):
        number = wanted if wanted.isdecimal() else client.get_model_version_by_alias(name, wanted).version
        # By its alias, MLflow gives a version without its aliases.
        return client.get_model_version(name, str(number))


def every(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Newest first."""
    with mlflow_errors(f"list the versions of {name}"):
        found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def download(version: ModelVersion, folder: str, directory: Path) -> Path:
    """Bring one folder of a version; MLflow refuses names that would lead out of `directory`.

    Args:
        folder: `evidence` or `checkpoint`

    Raises:
        RuntimeError: it is not there, or does not come.
    """
    uri = f"models:/{version.name}/{version.version}/{folder}"
    with mlflow_errors(f"download {uri}"):
        return Path(artifacts.download_artifacts(uri, dst_path=str(directory)))


def describe(uri: str) -> str:
    """What is known of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, for people.

    Raises:
        ValueError: not such a URI.
        RuntimeError: there is no such version.
    """
    reference = Reference.parse(uri)
    found = find(connect(reference.name), reference)
    lines = {
        "model": f"{reference.name} version {found.version}",
        "aliases": ", ".join(found.aliases) or "none",
        "run": found.run_id,
        **dict(sorted(found.tags.items())),
        "download": f"mlflow artifacts download -u {uri} -d DIRECTORY",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


@dataclass(frozen=True)
class Stored:
    """The files of a logged model, through whatever store or server keeps them."""

    repository: ArtifactRepository

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


def stored(client: MlflowClient, version: ModelVersion) -> Stored:
    """
    Raises:
        RuntimeError: it was not registered from a logged model, or that was deleted.
    """
    model_id = version.source.removeprefix("models:/")
    with mlflow_errors(f"find the files of {version.name} version {version.version}"):
        return _stored(client.get_logged_model(model_id))


def _stored(model: LoggedModel) -> Stored:
    return Stored(get_artifact_repository(model.artifact_location))


def unregistered(client: MlflowClient, experiment: str, name: str, before: datetime) -> Iterator[tuple[str, Stored]]:
    """Uploads for `name` that began before then and that no version came of: their ids and files."""
    with mlflow_errors(f"list the uploads for {name}"):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return
        registered = {version.source.removeprefix("models:/") for version in every(client, name)}
        token = ""
        while token is not None:
            page = client.search_logged_models([found.experiment_id], f"name = '{name}'", page_token=token or None)
            for model in page:
                if model.model_id not in registered and model.creation_timestamp < before.timestamp() * 1000:
                    yield model.model_id, _stored(model)
            token = page.token or None
