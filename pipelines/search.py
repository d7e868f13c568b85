"""Stage `search`: the model and the calibration set in, the trajectory and its curves out."""

from __future__ import annotations

import csv
import hashlib
import logging
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import finercut
from finercut.model.costs import costs_of
from finercut.model.devices import device_of, dtype_of, room_for
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_whole
from finercut.registry import live
from finercut.report.pictures import divergence_curves
from finercut.selection import distributed, greedy, streaming, trajectory
from finercut.selection.goal import Goal
from finercut.selection.records import SearchReport
from finercut.selection.settings import Budget, Search
from finercut.selection.trajectory import Provenance, Removal, Trajectory
from finercut.sources.records import FetchReport
from finercut.system.staging import staged_file
from finercut.tokens import Tokens, load_tokens

from . import paths
from .params import Params

logger = logging.getLogger("finercut")

# Held-out divergence this many times the calibration's: the removals fit the calibration set, not the model's use.
PART_RATIO = 1.5
# A trajectory is continued only by the code that began it: these rooms'.
SEARCHING = ("model", "selection")


def run(params: Params) -> SearchReport | None:
    """Search, continuing where an interrupted search of the same provenance stopped.

    With `n_processes`, in that many processes; started by torchrun, as one of its processes.

    Returns:
        The report; None in all processes of torchrun's but the first, which alone writes files and logs.

    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: more is to be removed than there is.
        RuntimeError: another process of the search has ended.
    """
    n_processes = params.search.n_processes
    if n_processes > 1 and not distributed.started():
        _inputs(params.search, params.prune.budget)  # report bad input once, not from every process
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "params.yaml"
            file.write_text(params.model_dump_json(by_alias=True), encoding="utf-8")
            distributed.start(n_processes, ["-m", f"{__package__}.cli", "search", "--params", str(file)])
        return SearchReport.read(paths.report("search"))
    with distributed.ranks() as ranks:
        return _search(params.search, params.prune.budget, ranks)


def _search(settings: Search, budget: Budget, ranks: distributed.Ranks) -> SearchReport | None:
    if not ranks.first:
        logger.setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
    fetched, tokens, goal = _inputs(settings, budget)
    device = device_of(settings.device, ranks.local_rank)
    dtype = dtype_of(settings.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    provenance = Provenance(
        model_source=fetched.source,
        model_revision=fetched.revision,
        model_sha256=fetched.sha256,
        n_blocks=fetched.n_blocks,
        calibration_sha256=tokens.calibration_sha256,
        held_out_sha256=tokens.held_out_sha256,
        divergence=settings.divergence,
        candidates=settings.candidates,
        protect=sorted(settings.protect),
        exclude=settings.exclude,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        mode=settings.mode,
        error_probability=settings.error_probability if settings.mode == "racing" else None,
        first_windows=_first_windows(settings, fetched.n_parameters * dtype.itemsize, len(tokens.calibration)),
        code_sha256=_code_sha256(),
    )
    in_progress = paths.WORK / "search" / provenance.key / paths.TRAJECTORY.name
    if len(set(ranks.gather(provenance.key))) > 1:
        raise ValueError("the processes differ in model, tokens, settings, code or versions; give all the same")
    (text, *_) = ranks.gather(trajectory.resume(in_progress, provenance).to_text() if ranks.first else None)
    found = trajectory.parse_trajectory(text, str(in_progress))
    removals = list(found.removals)
    names = [removal.sublayer for removal in removals]
    end = goal.end(names)
    resumed_after = len(names) if end is None else end
    if resumed_after:
        logger.info("search: %d removals found by an earlier search", resumed_after)
    if dtype == torch.bfloat16 != dtype_of("auto", device):
        logger.warning("search: this CPU does not multiply in bfloat16; search.dtype: float32 is several times faster")
    started = time.monotonic()
    if end is None:
        model = _load(settings, dtype, device, fetched.n_parameters, ranks)
        shown = {"total": goal.estimate(names), "disable": None if ranks.first else True}
        with tqdm(desc="search", unit="removal", initial=resumed_after, **shown) as bar:
            for removal in greedy.search(
                model,
                tokens.calibration,
                tokens.held_out,
                goal.n_most,
                divergence=settings.divergence,
                kinds=settings.candidates,
                protect=settings.protect,
                exclude=settings.exclude,
                mode=settings.mode,
                error_probability=settings.error_probability,
                first_windows=provenance.first_windows,
                micro_batch_tokens=None if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens,
                earlier=found.removals,
                ranks=ranks,
                progress=bar.refresh,
            ):
                removals.append(removal)
                names.append(removal.sublayer)
                end = goal.end(names)
                if ranks.first:
                    trajectory.append(in_progress, removal)
                    bar.set_postfix(
                        divergence=f"{removal.divergence:.4f}", saved=f"{work_saved(removal):.0%}", refresh=False
                    )
                    bar.total = goal.estimate(names) if end is None else end
                    bar.update()
                    _tell(removal, bar.total, time.monotonic() - started, resumed_after)
                if end is not None:
                    break
    if not ranks.first:
        return None
    live.finish()
    finished = Trajectory(provenance, tuple(removals[:end]))
    # Remove the stale report first, so that a crash cannot leave it beside the new trajectory.
    paths.report("search").unlink(missing_ok=True)
    trajectory.write(paths.TRAJECTORY, finished)
    finished.selection().write(paths.SELECTION)
    _write_curve(finished)
    divergence_curves(finished, paths.CURVE_PICTURE)
    report = _report(finished, settings, goal.n_candidates, resumed_after, time.monotonic() - started)
    if report.curves_part:
        logger.warning(
            "search: divergence on held-out tokens is %.2f times the calibration's: the removals fit the calibration "
            "set; make it larger or broader",
            report.final_held_out_divergence / report.final_divergence,
        )
    report.write(paths.report("search"))
    return report


def _inputs(settings: Search, budget: Budget) -> tuple[FetchReport, Tokens, Goal]:
    fetched = FetchReport.read(paths.report("fetch"))
    tokens = load_tokens(paths.CALIBRATION)
    tokens.check_vocabulary(fetched.vocab_size)
    costs = costs_of(ModelDirectory(paths.MODEL).written_by("fetch"))
    goal = Goal(settings, budget, costs, fetched.n_blocks)
    goal.check()
    return fetched, tokens, goal


def _load(
    settings: Search, dtype: torch.dtype, device: torch.device, n_parameters: int, ranks: distributed.Ranks
) -> PreTrainedModel:
    if settings.weights_gib is not None:
        model = load_whole(paths.MODEL, dtype)
        streaming.stream(model, device, int(settings.weights_gib * 2**30))
        return model
    if device.type != "cuda":
        return load_whole(paths.MODEL, dtype, device)
    # Other processes have the other GPUs.
    gpus = range(torch.cuda.device_count()) if settings.device == "auto" and ranks.size == 1 else [device.index]
    room = room_for(n_parameters * dtype.itemsize, {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus})
    if len(room) > 1:
        return load_whole(paths.MODEL, dtype, room=room)
    (gpu,) = room
    return load_whole(paths.MODEL, dtype, torch.device("cuda", gpu))


def _first_windows(settings: Search, weights_bytes: int, n_windows: int) -> int:
    """All where few candidates are begun and a part costs the transfer of all weights, however little it computes."""
    streamed = settings.weights_gib is not None and weights_bytes > settings.weights_gib * 2**30
    return n_windows if streamed and settings.mode == "lazy" else 1


def _code_sha256() -> str:
    """Over the names and contents of the modules in the rooms that search."""
    root = Path(finercut.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(file for room in SEARCHING for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def work_saved(removal: Removal) -> float:
    """Share of brute force's sublayer passes that a step did without."""
    return 1 - removal.sublayer_passes / removal.brute_force_sublayer_passes


def _tell(removal: Removal, n_removals: int, seconds: float, resumed_after: int) -> None:
    n_open = sum(map(len, (removal.values, removal.abandoned, removal.stale, removal.dropped)))
    eta_s = seconds / (removal.step - resumed_after) * max(0, n_removals - removal.step)
    logger.info(
        "search: %d/%d removed %s, divergence %.4f, held-out %.4f, %d of %d candidates evaluated, %.0f %% of brute "
        "force saved, about %.0f s left",
        removal.step,
        n_removals,
        removal.sublayer,
        removal.divergence,
        removal.held_out_divergence,
        removal.evaluations,
        n_open,
        100 * work_saved(removal),
        eta_s,
    )
    live.log_metrics(
        {
            "search.divergence": removal.divergence,
            "search.held_out_divergence": removal.held_out_divergence,
            "search.evaluations": removal.evaluations,
            "search.work_saved": work_saved(removal),
            "search.eta_s": eta_s,
        },
        step=removal.step,
    )


def _write_curve(finished: Trajectory) -> None:
    with staged_file(paths.CURVE) as partial, partial.open("w", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "sublayer", "divergence", "held_out_divergence"])
        table.writerows([r.step, r.sublayer, r.divergence, r.held_out_divergence] for r in finished.removals)


def _report(
    finished: Trajectory, settings: Search, n_candidates: int, resumed_after: int, seconds: float
) -> SearchReport:
    last = finished.removals[-1]
    margins = [r.margin for r in finished.removals if r.margin is not None]
    return SearchReport(
        mode=settings.mode,
        least_margin=min(margins, default=None),
        largest_fall=max(r.largest_fall for r in finished.removals),
        error_probability=sum(r.error_probability for r in finished.removals),
        divergence=settings.divergence,
        n_candidates=n_candidates,
        n_removals=len(finished.removals),
        removals=[r.sublayer for r in finished.removals],
        final_divergence=last.divergence,
        final_held_out_divergence=last.held_out_divergence,
        curves_part=last.held_out_divergence > PART_RATIO * last.divergence,
        evaluations=sum(r.evaluations for r in finished.removals),
        sublayer_passes=sum(r.sublayer_passes for r in finished.removals),
        brute_force_sublayer_passes=sum(r.brute_force_sublayer_passes for r in finished.removals),
        resumed_after=resumed_after,
        seconds=seconds,
    )
