"""All calls to DVC, and the git revision it works in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from scmrepo.exceptions import SCMError

from . import paths, settings


@dataclass(frozen=True)
class Stage:
    name: str
    reports: tuple[Path, ...]
    """Its outputs under reports/."""


@contextmanager
def _repo() -> Iterator[Repo]:
    settings.git("rev-parse", "--git-dir")  # says in one line what DVC would let through as it comes
    try:
        with Repo(str(Path.cwd())) as repo:
            yield repo
    except NotDvcRepoError as error:
        raise RuntimeError(f"DVC: {error}; run from the root of a clone of the project") from error
    except (DvcException, SCMError) as error:
        conflicts = [file for file in ("dvc.lock", "dvc.yaml") if _has_conflict(Path(file))]
        if conflicts:
            raise RuntimeError(
                f"{conflicts[0]} has the marks of a merge that git left to you: take one side, then run it again"
            ) from error
        raise RuntimeError(f"DVC: {error}") from error


def _has_conflict(file: Path) -> bool:
    return file.is_file() and any(line.startswith(b"<<<<<<< ") for line in file.read_bytes().splitlines())


def stages() -> list[Stage]:
    """In the order they run: every stage after those it depends on.

    Raises:
        RuntimeError: DVC cannot read them, or one is frozen: its outputs may be of other inputs than are recorded.
    """
    with _repo() as repo:
        if frozen := [s.addressing for s in repo.index.stages if s.frozen and s.cmd and _is_ours(s.addressing)]:
            raise RuntimeError(f"stage {frozen[0]} is frozen, so that no change reaches it: `dvc unfreeze {frozen[0]}`")
        graph = repo.index.graph
        # Where the graph leaves the order open, dvc.yaml's: claims are checked before anything is measured.
        number = {stage: n for n, stage in enumerate(repo.index.stages)}
        ordered = list(nx.lexicographical_topological_sort(graph.reverse(), key=number.__getitem__))
        return [Stage(s.addressing, _reports(s.outs)) for s in ordered if _is_ours(s.addressing)]


def _is_ours(address: str) -> bool:
    """Copies of dvc.yaml in other folders (MLflow keeps one a run, and a downloaded version has one) are no stages of
    this pipeline."""
    return not set(address) & set(":/")


def _reports(outs) -> tuple[Path, ...]:
    return tuple(sorted(Path(out.def_path) for out in outs if Path(out.def_path).is_relative_to(paths.REPORTS)))


def stale() -> list[str]:
    """Stages whose inputs, parameters, code or outputs differ from `dvc.lock`; not those that run every time."""
    with _repo() as repo:
        changed = [name for name, changes in repo.status().items() if "always changed" not in changes]
        return sorted(filter(_is_ours, changed))


def md5(output: Path) -> str:
    """What DVC recorded for `output`.

    Raises:
        RuntimeError: no stage has been reproduced that writes it.
    """
    with _repo() as repo:
        found = [
            out.hash_info.value for stage in repo.index.stages for out in stage.outs if out.def_path == str(output)
        ]
    if not found or found[0] is None:
        raise RuntimeError(f"dvc.lock has no {output}: run `finercut run` or `dvc repro` first")
    return found[0]


def unused(n_commits: int) -> list[Path]:
    """Files of DVC's cache that neither the workspace nor one of the last commits uses."""
    said = _gc(n_commits, "--dry")
    return [Path(line.removeprefix("Removing ")) for line in said.splitlines() if line.startswith("Removing ")]


def remove_unused(n_commits: int) -> None:
    """Delete what `unused` lists."""
    _gc(n_commits, "--force")


def cache_is_shared() -> bool:
    """Whether DVC's cache is outside the repository, where others may use it."""
    with _repo() as repo:
        # .dvc/cache, or the folder of the project, can be a link.
        return not Path(repo.cache.local.path).resolve().is_relative_to(Path(repo.root_dir).resolve())


def _gc(n_commits: int, option: str) -> str:
    keep = ["--workspace", "--rev", "HEAD", "--num", str(n_commits)]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "gc", *keep, option]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = next((x for x in done.stderr.splitlines() if x.startswith("ERROR: ")), "ERROR: no reason given")
        raise RuntimeError(f"DVC cannot collect its cache: {problem.removeprefix('ERROR: ')}")
    return done.stdout + done.stderr


def remote(purpose: str) -> str:
    """The name of the DVC remote that is pushed to and pulled from.

    Args:
        purpose: `push to` or `pull from`

    Raises:
        RuntimeError: there is none.
    """
    with _repo() as repo:
        name = repo.config["core"].get("remote")
    if not name:
        raise RuntimeError(f"nothing to {purpose}: name a DVC remote with `dvc remote add --default NAME URL`")
    return name


def revision() -> dict[str, str]:
    """Tags: the git commit, which of its params files was taken, and whether anything else differs from it.

    `dvc.lock` and `.finercut/` do not count, because every run writes them. Nor does params.yaml where it is a
    committed params file, with or without overrides: then `params.file` and `params.overrides` name them.
    """
    with _repo() as repo:
        try:
            commit = repo.scm.get_rev()
        except SCMError as error:
            raise RuntimeError(
                "git has no commit here, and runs and versions name theirs: commit the project first"
            ) from error
        staged, unstaged, untracked = repo.scm.status(untracked_files="all")
        changed = {path for group in staged.values() for path in group} | {*unstaged, *untracked}
        # Git's names start at its root, of which the project can be a folder.
        here = Path(repo.root_dir).resolve().relative_to(Path(repo.scm.root_dir).resolve())
        changed = {p for p in changed if p != str(here / "dvc.lock") and not Path(p).is_relative_to(here / paths.WORK)}
        if taken := settings.source():
            changed -= {str(here / paths.PARAMS)}
        return {
            "mlflow.source.git.commit": commit,
            "git.dirty": str(bool(changed)).lower(),
        } | (taken or {})
