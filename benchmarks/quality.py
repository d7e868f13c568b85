"""What each selection and each repair brings, on text and tasks that neither saw: `python benchmarks/quality.py`.

Every method selects for every budget (shares of the parameters outside embeddings) on the same calibration sets, two of
them, so that a difference can be told from noise; every selection is pruned and healed in every way. All checkpoints
are made by the pipeline's own stages, in workspaces under --folder, and measured alike: accuracy of tasks, perplexity
of each text, js divergence from the whole model by source, agreement on the most likely token, and repetition in greedy
continuations. What was measured is kept in --folder: a run that was stopped goes on where it was. A GPU with room takes
several --jobs at once. With --speed vLLM times sublayers of each whole model first, as the stage `costs` does, and
each selection has the share of a token's time that its sublayers add up to.

--data is a folder of other people's items and texts, none of which may be calibrated on: `NAME.jsonl` with `question`
and `choices` and `gold`, or `query`, or `contexts` and `continuation`, or `passage`, `question` and `label`; or with
`page`, a text. Without items, the smoke tasks have to do; without texts, the held-out tokens.

Prints a table, draws quality.png in --folder; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel

from finercut.evaluation.harness import LoadedTask, fit, load_tasks, score
from finercut.evaluation.settings import Task
from finercut.model.costs import Costs, costs_of
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.fitted_costs import costs_with
from finercut.model.loading import load
from finercut.selection.divergence import js
from finercut.selection.settings import CANDIDATES_OF
from finercut.sublayers import parse
from finercut.system import yaml_files
from finercut.tokens import by_source, load_tokens, repetition
from pipelines import cli_stages, paths
from pipelines.params import Params

logger = logging.getLogger("finercut")
ROOT = Path(__file__).resolve().parents[1]

OURS = {
    "greedy": {"per": None, "candidates": "both"},
    "greedy per parameter": {"per": "parameters", "fill": True, "candidates": "both"},
    "blocks too per parameter": {"per": "parameters", "fill": True, "candidates": "any"},
    "swaps per parameter": {"per": "parameters", "fill": True, "candidates": "both", "swaps": 1},
}
BASELINES = ("random", "last_blocks", "shortgpt", "gromov", "llm_drop", "sleb", "block_pruner", "one_shot")
METHODS: dict[str, dict[str, Any]] = OURS | {
    name: {
        "method": name,
        "candidates": next(kind for kind in ("both", "blocks") if kind in CANDIDATES_OF[name]),
        "mode": "exact",
        "per": None,
        "swaps": 0,
        "fill": True,
    }
    for name in BASELINES
}
HEALING: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "refit": {
        "method": "refit",
        "ridges": [0.001, 0.01, 0.1, 0.3, 1.0, 3.0],
        "fractions": [0.5, 0.75, 1.0],
        "batch_tokens": 2048,
        "dtype": "auto",
        "device": "auto",
    },
    "reconstruct": {
        "method": "reconstruct",
        "sublayers": "all",
        "ridges": [0.001, 0.01, 0.1, 0.3, 1.0, 3.0],
        "steps": 100,
        "batch_tokens": 2048,
        "learning_rate": 1e-4,
        "warm_up": 0.1,
        "eval_every": 25,
        "fractions": [0.5, 0.75, 1.0],
        "seed": 0,
        "dtype": "auto",
        "device": "auto",
    },
    "distill": {
        "method": "distill",
        "trainable": "blocks",
        "lora_rank": 16,
        "minutes": None,
        "batch_tokens": 512,
        "learning_rate": 2e-4,
        "warm_up": 0.1,
        "ce_weight": 0.0,
        "eval_every": 8,
        "patience": None,
        "seed": 0,
        "dtype": "auto",
        "device": "auto",
    },
}
HEALING["refit and distill"] = HEALING["distill"] | {k: HEALING["refit"][k] for k in ("ridges", "fractions")}
N_CONTINUATIONS, N_PROMPT, N_WRITTEN = 16, 32, 64
# Windows of one forward.
N_AT_ONCE = 8


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = _models(arguments)
    if arguments.job is not None:
        model, sample, method = json.loads(arguments.job)
        _Workspace(arguments, model, models[model], sample).run(method)
        return
    benches = [
        _Workspace(arguments, model, fetch, sample)
        for model, fetch in models.items()
        for sample in range(arguments.samples)
    ]
    for bench in benches:
        bench.prepare()
    jobs = [(bench, method) for bench in benches for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: (_in_process if arguments.jobs > 1 else _Workspace.run)(*job), jobs))
    _show([row for bench in benches for row in bench.rows()], arguments)


def _in_process(bench: _Workspace, method: str) -> None:
    job = json.dumps([bench.model, bench.sample, method])
    done = subprocess.run([sys.executable, *sys.argv, "--job", job], check=False)
    if done.returncode:
        logger.warning("%s of sample %d ended with status %d", method, bench.sample, done.returncode)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml", help="model, texts and all other settings")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model directory more; repeatable")
    parser.add_argument("--data", type=Path, help="folder of items and texts to measure with")
    parser.add_argument("--folder", type=Path, default=Path(".finercut/quality"), help="where to work and continue")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--budgets", default="0.1,0.2,0.25,0.3", help="shares of the parameters outside embeddings")
    parser.add_argument("--heal", default="none,refit,distill", help=f"of: {', '.join(HEALING)}")
    parser.add_argument("--tokens", type=int, default=32768, help="that distillation trains on")
    parser.add_argument("--samples", type=int, default=2, help="calibration sets, by calibrate.shuffle_seed")
    parser.add_argument("--mode", default="lazy", help="of our searches: exact, lazy")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--text-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--speed", action="store_true", help="time sublayers in vLLM: what selections save of the time")
    parser.add_argument("--jobs", type=int, default=1, help="methods at work at once, each in a process of its own")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()
    arguments.data = arguments.data and arguments.data.absolute()
    for name, known in (("methods", METHODS), ("heal", HEALING)):
        asked = getattr(arguments, name).split(",")
        if unknown := set(asked) - set(known):
            parser.error(f"--{name}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(arguments, name, asked)
    arguments.budgets = [float(budget) for budget in arguments.budgets.split(",")]
    return arguments


def _models(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Section `fetch` of each model, by a name for people."""
    own = yaml_files.read(arguments.params)["fetch"]
    found = {str(own["source"].get("name") or own["source"].get("repository") or own["source"].get("path")): own}
    for path in arguments.model:
        found[path.name] = {"source": {"kind": "local", "path": str(path.absolute())}}
    return found


class _Workspace:
    """One model and one calibration set: their methods, budgets and repairs."""

    def __init__(self, arguments: argparse.Namespace, model: str, fetch: Mapping[str, Any], sample: int) -> None:
        self.arguments, self.model, self.sample = arguments, model, sample
        self.root = arguments.folder / model.replace("/", "--") / f"sample{sample}"
        self.values = yaml_files.read(arguments.params) | {"fetch": dict(fetch)}
        self.values["calibrate"] = self.values["calibrate"] | {"shuffle_seed": sample}
        self.results = self.root / "results.jsonl"
        self.root.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """What all methods need: the model, its windows and its figures."""
        self._stages(self.root, {"fetch": paths.MODEL, "calibrate": paths.CALIBRATION}, {})
        if self.arguments.speed:
            budget = {"unit": "speed_up", "amount": 1.1}  # any: it is what has the stage time sublayers
            self._stages(self.root, {"costs": paths.report("costs")}, {"prune": {"budget": budget}})
        if "whole" not in self.done():
            self._keep("whole", {"method": "whole", "heal": "none"} | self.measure.of(self.whole))

    def run(self, method: str) -> None:
        # From the smallest budget on: a greedy search continues where the one before it ended.
        for share in sorted(self.arguments.budgets):
            try:
                self._at_budget(method, share)
            except (ValueError, RuntimeError) as error:
                logger.warning("%s at %g: %s", method, share, error)

    @cached_property
    def whole(self) -> ModelDirectory:
        return ModelDirectory(self.root / paths.MODEL)

    @cached_property
    def measure(self) -> _Measure:
        return _Measure(self.arguments, self.root)

    def _at_budget(self, method: str, share: float) -> None:
        where = self.root / f"{method.replace(' ', '_')}-{share:g}"
        search = self.values["search"] | {"mode": self.arguments.mode, "removals": "auto"} | METHODS[method]
        budget = {"unit": "parameters", "amount": _of_all_parameters(share, costs_of(self.whole))}
        for healing in self.arguments.heal:
            key = f"{method} {share:g} {healing}"
            if key in self.done():
                continue
            heal = HEALING[healing] | ({"tokens": self.arguments.tokens} if "distill" in healing else {})
            changes = {"search": search, "prune": {"budget": budget}, "heal": heal}
            self._share_inputs(where, method)
            seconds = self._stages(where, {"search": paths.SELECTION, "prune": paths.PRUNED}, changes)
            healed = where / paths.HEALED
            with contextlib.suppress(FileNotFoundError):
                (where / paths.report("heal")).unlink()
            seconds |= self._stages(where, {"heal": None}, changes)
            report = json.loads((where / paths.report("search")).read_text(encoding="utf-8"))
            pruned = json.loads((where / paths.report("prune")).read_text(encoding="utf-8"))
            self._keep(
                key,
                {
                    "method": method,
                    "budget": share,
                    "heal": healing,
                    "removed": pruned["removed"],
                    "shares": pruned["shares"],
                    "search_s": report["seconds"],
                    "heal_s": seconds["heal"] if healing != "none" else 0.0,
                }
                | self.measure.of(ModelDirectory(healed)),
            )
        for made in (paths.PRUNED, paths.HEALED):
            shutil.rmtree(where / made, ignore_errors=True)

    def _share_inputs(self, where: Path, method: str) -> None:
        for path in (paths.MODEL, paths.CALIBRATION, paths.report("fetch"), paths.report("calibrate")):
            link = where / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(self.root / path)
        # Greedy searches of several budgets are one search.
        work, shared = where / paths.WORK, self.root / "work" / method
        if not work.exists():
            shared.mkdir(parents=True, exist_ok=True)
            work.symlink_to(shared)

    def _stages(self, where: Path, stages: Mapping[str, Path | None], changes: Mapping[str, Any]) -> dict[str, float]:
        """Run those whose output is not there; the seconds each took."""
        settings = Params.model_validate(self.values | changes)
        seconds = {}
        where.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(where):
            paths.REPORTS.mkdir(exist_ok=True)
            for stage, output in stages.items():
                began = time.monotonic()
                if output is None or not output.exists():
                    cli_stages.runner(stage)(settings)
                seconds[stage] = time.monotonic() - began
        return seconds

    def done(self) -> dict[str, dict[str, Any]]:
        if not self.results.is_file():
            return {}
        lines = self.results.read_text(encoding="utf-8").splitlines()
        return {row["key"]: row for row in map(json.loads, lines)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was measured; with --speed, what each selection saves of the time of a token."""
        time_ = costs_with(self.whole, self.root / paths.report("costs"))["time"] if self.arguments.speed else None
        for row in self.done().values():
            if time_ and "shares" in row:
                removed = [parse(name).sublayers[0] for name in row["removed"]]
                row["shares"]["time"] = time_.share(removed)
            yield row

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        row = {"key": key, "model": self.model, "sample": self.sample} | row
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
        logger.info("quality: %s, sample %d: %s", key, self.sample, shown)


def _of_all_parameters(share: float, costs: Costs) -> float:
    """`share` of the parameters outside embeddings, as a share of all."""
    parameters = costs["parameters"]
    return share * sum(parameters.by_sublayer.values()) / parameters.whole


class _Measure:
    """Figures of one checkpoint after the other, on the same items and texts."""

    def __init__(self, arguments: argparse.Namespace, root: Path) -> None:
        self.device = device_of("auto")
        self.dtype = dtype_of("auto", self.device)
        self.directory = ModelDirectory(root / paths.MODEL)
        self.whole = load(self.directory, self.dtype, self.device)
        self.tasks = _tasks(arguments)
        tokenizer = self.directory.tokenizer
        tokens = load_tokens(root / paths.CALIBRATION)
        self.held_out, self.sources = tokens.held_out, tokens.sources_of("held_out")
        self.texts = {"held_out": self.held_out}
        for file in sorted(arguments.data.glob("*.jsonl")) if arguments.data else []:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            if "page" in rows[0]:
                text = "\n\n".join(_readable(row["page"]) for row in rows)
                ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.text_tokens]
                self.texts[file.stem] = ids[: len(ids) // 512 * 512].view(-1, 512)

    def of(self, directory: ModelDirectory) -> dict[str, float]:
        model = load(directory, self.dtype, self.device)
        found = {
            f"perplexity.{name}": fit(model, self.directory.tokenizer, windows).perplexity
            for name, windows in self.texts.items()
        }
        found |= _against(self.whole, model, self.held_out, self.sources)
        found["repetition"] = _repetition(model, self.held_out)
        options = {"seed": 1234, "batch_size": 16}
        for name, reached in score(model, self.directory.tokenizer, self.tasks, **options):
            found[f"task.{name}"] = reached.value
        return found


@torch.inference_mode()
def _against(
    whole: PreTrainedModel, model: PreTrainedModel, windows: Tensor, sources: Sequence[str]
) -> dict[str, float]:
    divergence: list[float] = []
    agreement: list[float] = []
    for batch in windows.to(model.device).split(N_AT_ONCE):
        expected, found = (m(batch).logits.float() for m in (whole, model))
        divergence += js(expected, found).mean(-1).tolist()
        agreement += (expected.argmax(-1) == found.argmax(-1)).float().mean(-1).tolist()
    of_sources = by_source(divergence, sources).items()
    each = {f"divergence.{source}": statistics.fmean(found) for source, found in of_sources}
    mean = statistics.fmean(each.values() if each else divergence)
    return {"divergence": mean, "agreement": statistics.fmean(agreement)} | each


@torch.inference_mode()
def _repetition(model: PreTrainedModel, windows: Tensor) -> float:
    """Share of the 4-grams of greedy continuations that occurred before in them."""
    prompts = windows[:N_CONTINUATIONS, :N_PROMPT].to(model.device)
    options = {"do_sample": False, "min_new_tokens": N_WRITTEN, "max_new_tokens": N_WRITTEN}
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, N_PROMPT:].tolist()
    return statistics.fmean(map(repetition, written))


def _readable(page: str) -> str:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": page})


def _tasks(arguments: argparse.Namespace) -> list[LoadedTask]:
    files = sorted(arguments.data.glob("*.jsonl")) if arguments.data else []
    configs = [config for file in files if (config := _task_config(file))]
    if not configs:
        own = yaml_files.read(arguments.params)["evaluate"]["tasks"]
        return load_tasks([Task.model_validate(task | {"limit": arguments.limit}) for task in own])
    manager = TaskManager(include_defaults=False)
    return [
        LoadedTask(
            Task(name=config["task"], metric=metric, limit=arguments.limit), manager.load([config]), f"{metric},none"
        )
        for config in configs
        for metric in [config["metric_list"][-1]["metric"]]
    ]


def _task_config(file: Path) -> dict[str, Any] | None:
    """For lm-eval, by the fields of the first item; None for a text."""
    fields = set(json.loads(file.read_text(encoding="utf-8").splitlines()[0]))
    by_length = [{"metric": "acc"}, {"metric": "acc_norm"}]
    if "page" in fields:
        return None
    if "contexts" in fields:
        ask = {"doc_to_text": "{{gold}}", "doc_to_choice": "{{contexts}}", "doc_to_target": "{{continuation}}"}
        metrics = [{"metric": "acc"}]
    elif "passage" in fields:
        question = "{{passage}}\nQuestion: {{question}}?\nAnswer:"
        ask = {"doc_to_text": question, "doc_to_choice": ["no", "yes"], "doc_to_target": "{{label|int}}"}
        metrics = [{"metric": "acc"}]
    else:
        question = "{{query}}" if "query" in fields else "Question: {{question}}\nAnswer:"
        ask = {"doc_to_text": question, "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
        metrics = [{"metric": "acc"}] if "query" in fields else by_length
    return {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "metric_list": [metric | {"aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "num_fewshot": 0,
    } | ask


def _show(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    summaries = list(_summaries(rows))
    head = f"{'model':14s} {'method':28s} {'budget':>6s} {'healing':8s} {'retention':>15s} {'repeats':>8s} {'js':>7s}"
    print(f"{head}  perplexity ratio")
    for row in summaries:
        ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["perplexity_ratio"].items())
        spread = f"{row['retention']:.3f} ± {row['spread']:.3f}"
        print(
            f"{row['model'][:14]:14s} {row['method']:28s} {row['budget']:6g} {row['heal']:8s} {spread:>15s} "
            f"{row['repetition']:8.2f} {row['divergence']:7.4f}  {ratios}"
        )
    if summaries:
        _draw(summaries, arguments.folder / "quality.png")
    device = device_of("auto")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = {"hardware": hardware, "n_cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"results": summaries, "tokens": arguments.tokens, "machine": machine}))


def _summaries(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over the calibration sets, with the largest distance from the mean accuracy."""
    wholes = {(row["model"], row["sample"]): row for row in rows if row["method"] == "whole"}
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] != "whole":
            groups.setdefault((row["model"], row["budget"], row["heal"], row["method"]), []).append(row)
    for (model, budget, heal, method), found in sorted(groups.items()):
        common = [name for name in found[0] if all(name in row for row in found)]
        tasks, texts, sources = (
            [name for name in common if name.startswith(prefix)] for prefix in ("task.", "perplexity.", "divergence.")
        )
        retention = []
        for row in found:
            whole = wholes[model, row["sample"]]
            retention.append(statistics.fmean(row[task] / whole[task] for task in tasks))
        yield {
            "model": model,
            "method": method,
            "budget": budget,
            "heal": heal,
            "n_samples": len(found),
            "retention": statistics.fmean(retention),
            "spread": max(abs(value - statistics.fmean(retention)) for value in retention),
            "perplexity_ratio": {
                name.removeprefix("perplexity."): statistics.fmean(
                    row[name] / wholes[model, row["sample"]][name] for row in found
                )
                for name in texts
            },
            "shares": found[0]["shares"],
            **{
                name: statistics.fmean(row[name] for row in found)
                for name in ("divergence", "agreement", "repetition", "search_s", "heal_s", *sources)
            },
        }


def _draw(summaries: Sequence[Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = [name for name in ("parameters", "kv_cache", "time") if name in summaries[0]["shares"]]
    healings = [name for name in HEALING if any(row["heal"] == name for row in summaries)]
    figure, axes = plt.subplots(len(healings), len(costs), figsize=(6 * len(costs), 4 * len(healings)), squeeze=False)
    for line, healing in zip(axes, healings, strict=True):
        for axis, cost in zip(line, costs, strict=True):
            axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
            for method in dict.fromkeys(row["method"] for row in summaries):
                points = [row for row in summaries if row["method"] == method and row["heal"] == healing]
                points.sort(key=lambda row: row["shares"][cost])
                style = "o-" if method in OURS else "x--"
                axis.plot([p["shares"][cost] for p in points], [p["retention"] for p in points], style, label=method)
            axis.set(
                xlabel=f"saved of {cost.replace('time', 'the time of a token')}",
                ylabel="mean retention of the tasks",
                title=f"healing: {healing}",
            )
            axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
