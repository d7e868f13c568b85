"""The door to the Hugging Face hub: revisions resolved to commits, and its refusals in words that say what to do."""

from __future__ import annotations

import glob
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("finercut")

Kind = Literal["model", "dataset"]

# Seconds before each further attempt, where the hub gives no answer or a fault of its own.
PAUSES_S = (1.0, 4.0)

_TOKEN = "give a token: `hf auth login`, or set HF_TOKEN"


class NoAnswer(RuntimeError):
    """The hub cannot be reached, is not to be asked, or has a fault of its own."""


@contextmanager
def hub_errors(repository: str, revision: str, kind: Kind = "model") -> Iterator[None]:
    """Turns what the hub client raises inside the block into one line.

    Raises:
        ValueError: no such repository or revision.
        RuntimeError: no access.
        NoAnswer: no answer.
    """
    at = "/".join([constants.ENDPOINT, *(["datasets"] if kind == "dataset" else []), repository])
    try:
        yield
    except GatedRepoError as error:
        raise RuntimeError(f"{repository} is gated: accept its licence at {at}, then {_TOKEN}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"no repository {at}, or a private one: check the name, or {_TOKEN}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repository} has no revision {revision!r}: name a branch, tag or commit of {at}") from error
    except OfflineModeIsEnabled as error:
        raise NoAnswer(f"HF_HUB_OFFLINE is set: unset it for {repository}, or use a local source") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RuntimeError(f"{constants.ENDPOINT} refuses the token for {repository}: {_TOKEN}") from error
        raise NoAnswer(f"{at} answers {error.response.status_code}: try again later") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise NoAnswer(f"cannot reach {at}: check the network and HF_ENDPOINT, or use a local source") from error


def is_commit(revision: str) -> bool:
    """Whether a revision says by itself what it stands for."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def resolve(repository: str, revision: str, kind: Kind = "model") -> tuple[str, list[str]]:
    """The commit a branch, tag or commit stands for, and the names of the files it has. Raises as `hub_errors` does."""
    with hub_errors(repository, revision, kind):
        info = _repository_info(repository, revision, kind)
    if info.sha is None:
        raise RuntimeError(f"{constants.ENDPOINT} does not say which commit {revision!r} of {repository} is")
    return info.sha, [file.rfilename for file in info.siblings or []]


def _repository_info(repository: str, revision: str, kind: Kind) -> ModelInfo | DatasetInfo:
    for pause_s in PAUSES_S:
        try:
            return HfApi().repo_info(repository, revision=revision, repo_type=kind)
        except (HTTPError, ConnectionError) as error:
            answer = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if isinstance(error, OfflineModeIsEnabled) or (answer is not None and answer < 500 and answer != 429):
                raise
            logger.warning("%s: %s; trying again in %.0f s", repository, answer or "no answer", pause_s)
            time.sleep(pause_s)
    return HfApi().repo_info(repository, revision=revision, repo_type=kind)


def cached(repository: str, commit: str) -> Path | None:
    """The folder of that commit in the Hugging Face cache of this machine, however much of it is there."""
    try:
        return Path(snapshot_download(repository, revision=commit, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def cached_rows(dataset: str, config: str | None, split: str, commit: str) -> Dataset | None:
    """A split of a dataset as `datasets` prepared it from that commit on this machine; None where it has not."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, name = dataset.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(name)])
    prepared = sorted(folder.glob(f"{glob.escape(config) if config else '*'}/*/{commit}"))
    if len(prepared) != 1:
        return None
    config_name, version, _ = prepared[0].parts[-3:]
    builder = Cache(repo_id=dataset, dataset_name=name, config_name=config_name, version=version, hash=commit)
    return builder.as_dataset(split=split)
