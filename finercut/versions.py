"""The door to registered versions: find one, tell what it is, bring its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient, artifacts, set_tracking_uri
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import impatient, mlflow_errors, tracking_uri


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
