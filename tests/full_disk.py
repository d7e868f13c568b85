"""Stages on a full disk, one after another in one process, which imports them once; test_faults.py runs it as a script.

It needs a mount namespace of its own. Its arguments are a project, a folder for what is left, and `STAGE:ROOM` for each
trial. In the folder each trial has one of that name: what the stage said without room (`said`) and its exit status
(`status`), the project afterwards (`after`), and the project after a second run with all the room (`again`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Started by name, a stage is imported when it runs: here that is before it is forked.
from kill_stages import outputs

from finercut.serving import vllm_engine
from pipelines import calibrate, cli, evaluate, fetch, prune, search  # noqa: F401

FILL = 'dd if=/dev/zero of=filler bs=4k status=none || true; truncate -s "-$0" filler'


def main(project: Path, left: Path, *trials: str) -> None:
    vllm_engine.find_spec = lambda name: None  # its import takes seconds
    disk = left / "disk"
    disk.mkdir()
    for trial in trials:
        stage, room = trial.split(":")
        (left / trial).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
        copy(project, disk)
        shutil.rmtree(disk / ".finercut", ignore_errors=True)
        for path in outputs(stage):
            shutil.rmtree(disk / path) if (disk / path).is_dir() else (disk / path).unlink()
        subprocess.run(["sh", "-c", FILL, room], cwd=disk, check=True)
        (left / trial / "status").write_text(str(run(stage, disk, left / trial / "said")))
        (disk / "filler").unlink()
        copy(disk, left / trial / "after")
        run(stage, disk, left / trial / "said again")
        copy(disk, left / trial / "again")
        subprocess.run(["umount", disk], check=True)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)


def run(stage: str, directory: Path, said: Path) -> int:
    """The exit status of `finercut STAGE`."""
    if (child := os.fork()) == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(directory)
        status = 1
        try:
            cli.main([stage], prog_name="finercut")
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
