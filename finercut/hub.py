"""The door to the Hugging Face hub: revisions resolved to commits, and its refusals in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

Kind = Literal["model", "dataset"]

_TOKEN = "give a token: `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(repository: str, revision: str, kind: Kind = "model") -> Iterator[None]:
    """Turns what the hub client raises inside the block into one line.

    Raises:
        ValueError: no such repository or revision.
        RuntimeError: no access, or no answer.
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
        raise RuntimeError(f"HF_HUB_OFFLINE is set: unset it for {repository}, or use a local source") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RuntimeError(f"{constants.ENDPOINT} refuses the token for {repository}: {_TOKEN}") from error
        raise RuntimeError(f"{at} answers {error.response.status_code}: try again later") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise RuntimeError(f"cannot reach {at}: check the network and HF_ENDPOINT, or use a local source") from error


def resolve(repository: str, revision: str, kind: Kind = "model") -> tuple[str, list[str]]:
    """The commit a branch, tag or commit stands for, and the names of the files it has. Raises as `explained` does."""
    with explained(repository, revision, kind):
        info: ModelInfo | DatasetInfo = HfApi().repo_info(repository, revision=revision, repo_type=kind)
    if info.sha is None:
        raise RuntimeError(f"{constants.ENDPOINT} does not say which commit {revision!r} of {repository} is")
    return info.sha, [file.rfilename for file in info.siblings or []]
