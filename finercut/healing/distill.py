"""Healing by distillation: the whole model teaches the pruned one, by transformers' Trainer.

Training starts from a refit. The loss is KL(whole || pruned) plus a share of the cross-entropy with the text. Held-out
divergence decides when to stop and which state is taken.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import tqdm
from transformers import GenerationConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from finercut.healing import along_depth
from finercut.healing.fidelity import LOGITS_AT_ONCE, Logits, logits_of
from finercut.healing.schedule import order, rate, with_repeated
from finercut.healing.settings import Distill
from finercut.healing.task import Healed, Task
from finercut.model.directory import quiet
from finercut.model.families import Layout, layout_of
from finercut.model.loading import load_pruned, load_whole
from finercut.model.modeling_finercut import branch_of, bypass
from finercut.selection import refit
from finercut.system.staging import staged_file

logger = logging.getLogger("finercut")

# What lora's update is multiplied by.
LORA_SCALE = 2
STATE = "trainer_state.json"
START = "start.safetensors"
# Matrices whose weights kernels of state space models take without calling the module: peft adapts none of them.
_BY_KERNELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_NOT_CALLED = {"conv1d", "out_proj"}


def heal(task: Task, settings: Distill) -> Healed:
    """Train, continuing where an interrupted run of the same inputs and settings stopped.

    Raises:
        ValueError: a batch smaller than a window, or fewer tokens than a batch.
        RuntimeError: loss or logits that are not finite.
    """
    settings.check(task.windows.shape[1])
    device = task.device
    with quiet():
        folder = task.folder(settings)
        start = _refitted(task, settings, folder)
        pair = (_lora if settings.trainable == "lora" else _blocks)(task, settings)
        for name, value in start.items():
            parameter = pair.student.get_parameter(name)
            parameter.data = value.to(parameter, copy=True)
        task.held_out.expect(pair.teacher, device)
        mixed = task.dtype == torch.bfloat16 and _runs_in_both(pair.student, task.windows[:1].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):  # as the trained model will be judged
            before = task.held_out.fidelity(logits_of(pair.student), device)
        logger.info("heal: before, held-out divergence %.4f, perplexity %.2f", before.divergence, before.perplexity)
        trainer = _trainer(task, settings, pair, before.divergence, mixed, folder)
        n_fitted = task.windows.numel() if start else 0
        trainer.train(resume_from_checkpoint=_last(folder))
    healed = Healed(start, n_fitted)
    if trainer.state.best_metric < before.divergence:
        n_trained = trainer.state.best_global_step * trainer.tokens_per_step
        healed = Healed(pair.parameters(), n_fitted + n_trained)
    # Trainer and its scheduler name each other: without this, both models and the moments would stay in memory.
    del trainer, pair
    gc.collect()
    return healed


def _refitted(task: Task, settings: Distill, folder: Path) -> dict[str, Tensor]:
    """The values that training starts from, of an interrupted run where there is one; none without a refit."""
    file, layout = folder / START, Layout.from_dict(task.pruned.settings["finercut"]["layout"])
    if file.is_file():
        return load_file(file)
    if not settings.ridges:
        return {}
    if settings.trainable == "lora" or len(task.windows) < 2 or not refit.fits(layout, task.whole.config):
        logger.info("heal: nothing is refitted first, which takes blocks to train, in sequence, and two windows")
        return {}
    found = along_depth.heal(task, settings, lambda depth: refit.ClosedForm(depth, settings.ridges))
    with staged_file(file) as partial:
        save_file({name: value.contiguous() for name, value in found.items()}, partial)
    return found


@dataclass(frozen=True)
class _Pair:
    student: nn.Module
    """What is trained; parameters that stay as they are require no gradient."""
    teacher: Logits
    parameters: Callable[[], Mapping[str, Tensor]]
    """The trained values, by the pruned model's names."""


def _blocks(task: Task, settings: Distill) -> _Pair:
    """Two models; every parameter of the blocks is trained, in float32."""
    student = load_pruned(task.pruned, torch.float32, task.device)
    student.generation_config = GenerationConfig()  # saving refuses some that loading takes; nothing here writes text
    inside = Layout.from_dict(task.pruned.settings["finercut"]["layout"]).blocks + "."
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith(inside))
    teacher = load_whole(task.whole, task.dtype, task.device)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return _Pair(student, logits_of(teacher), lambda: {name: p.detach().cpu() for name, p in trained.items()})


def _lora(task: Task, settings: Distill) -> _Pair:
    """One model: with adapters and without the removed sublayers it is the student, the other way round the teacher."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    whole = load_whole(task.whole, task.dtype, task.device)
    layout, removed = layout_of(whole.config), task.pruned.removed
    blocks = layout.holders(whole)
    members = (blocks[s.block].get_submodule(name) for s in removed for name in layout.branch(s.kind, s.block).members)
    gone = {module for member in members for module in member.modules()}
    targets = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.startswith(f"{layout.blocks}.")
        and module not in gone
        and not (whole.config.model_type in _BY_KERNELS and name.rpartition(".")[2] in _NOT_CALLED)
    ]
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=LORA_SCALE * settings.lora_rank,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(whole.get_submodule(name), Conv1D) for name in targets),
    )
    student = get_peft_model(whole, config)
    swaps = []
    for sublayer in removed:
        block, branch = blocks[sublayer.block], branch_of(layout.to_dict(), sublayer.kind, sublayer.block)
        for name, own in bypass(block, sublayer.kind, branch).items():
            swaps.append((block, name, own, block.get_submodule(name)))

    @contextmanager
    def as_teacher() -> Iterator[None]:
        for block, name, own, _ in swaps:
            block.set_submodule(name, own)
        try:
            with student.disable_adapter():
                yield
        finally:
            for block, name, _, stand_in in swaps:
                block.set_submodule(name, stand_in)

    def teacher(tokens: Tensor) -> Tensor:
        with as_teacher():
            return logits_of(student)(tokens)

    def merged() -> dict[str, Tensor]:
        # Added to the stored weights: those in memory may be rounded.
        stored = load_pruned(task.pruned)
        prefix = "base_model.model."
        found = {}
        for name, module in student.named_modules():
            if isinstance(module, LoraLayer):
                own = f"{name.removeprefix(prefix)}.weight"
                update = module.get_delta_weight("default").detach().float().cpu()
                found[own] = stored.get_parameter(own).detach().float() + update
        return found

    return _Pair(student, teacher, merged)


class _Windows(torch.utils.data.Dataset):
    """`n` windows, in random order."""

    def __init__(self, windows: Tensor, n: int, seed: int) -> None:
        self.windows = windows
        self.order = order(len(windows), n, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[self.order[index]]}


class _Trainer(Trainer):
    """The loss, the evaluation and the schedule; all else is transformers'."""

    def __init__(self, pair: _Pair, task: Task, settings: Distill, tokens_per_step: int, **options: Any) -> None:
        self.pair = pair
        self.task = task
        self.settings = settings
        self.tokens_per_step = tokens_per_step
        self.clock = _Clock(settings.minutes)
        super().__init__(model=pair.student, callbacks=[self.clock], **options)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *_: Any, **__: Any) -> Tensor:
        # Trainer has just switched dropout on; with it the pruned model could never be the whole one.
        model.eval()
        tokens = inputs["input_ids"]
        with torch.no_grad():
            log_p = self.pair.teacher(tokens).float().log_softmax(-1)
        log_q = logits_of(model)(tokens).float().log_softmax(-1)
        loss = kl_div(log_q, log_p, reduction="sum", log_target=True) / tokens.numel()
        if self.settings.ce_weight:
            of_next = log_q[:, :-1].gather(-1, tokens[:, 1:, None])
            loss = loss - self.settings.ce_weight * of_next.mean()
        if not loss.isfinite():
            raise RuntimeError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}: lower heal.learning_rate"
            )
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        found = self.task.held_out.fidelity(logits_of(self.model), self.args.device)
        metrics = {
            "eval_divergence": found.divergence,
            "eval_perplexity": found.perplexity,
            "elapsed_s": self.clock.elapsed_s,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                done = max((step + 0.5) / num_training_steps, self.clock.share)
                return rate(done, self.settings.warm_up)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler


class _Clock(TrainerCallback):
    """Counts the seconds of this and of interrupted runs, and ends the training in time."""

    def __init__(self, minutes: float | None) -> None:
        self.limit_s = math.inf if minutes is None else 60 * minutes
        self.began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def share(self) -> float:
        return self.elapsed_s / self.limit_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        earlier = [entry["elapsed_s"] for entry in state.log_history if "elapsed_s" in entry]
        self.began = time.monotonic() - max(earlier, default=0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.share >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = True


class _Patience(TrainerCallback):
    """Ends the training after some evaluations without a lower divergence; the pruned model's is the first.

    Reads them from the log, so that an interrupted run goes on as it would have; transformers' own callback keeps a
    count.
    """

    def __init__(self, patience: int, before: float) -> None:
        self.patience = patience
        self.before = before

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        later = [entry["eval_divergence"] for entry in state.log_history if "eval_divergence" in entry]
        found = [self.before, *later]
        if len(found) - 1 - found.index(min(found)) >= self.patience:
            control.should_training_stop = True

    on_train_begin = on_evaluate


class _Reporting(TrainerCallback):
    """The progress bar, a log line for each evaluation, and live metrics."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.bar: tqdm | None = None
        self.loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            logger.info("heal: continues after step %d of an interrupted run", state.global_step)
        self.bar = tqdm(desc="heal", unit="step", initial=state.global_step, total=state.max_steps, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)
        names = {"loss": "heal.loss", "learning_rate": "heal.learning_rate"}
        names |= {"eval_divergence": "heal.held_out_divergence", "eval_perplexity": "heal.perplexity"}
        if sent := {names[name]: value for name, value in logs.items() if name in names}:
            self.task.on_metrics(sent, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        self.bar.set_postfix(divergence=f"{metrics['eval_divergence']:.4f}")
        logger.info(
            "heal: step %d/%d, held-out divergence %.4f, perplexity %.2f, loss %.4f, %.0f s",
            state.global_step,
            state.max_steps,
            metrics["eval_divergence"],
            metrics["eval_perplexity"],
            self.loss,
            metrics["elapsed_s"],
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def _trainer(
    task: Task,
    settings: Distill,
    pair: _Pair,
    before: float,
    mixed: bool,
    folder: Path,
) -> _Trainer:
    n_tokens = task.windows.shape[1]
    n_batch = settings.batch_tokens // n_tokens
    n_steps = settings.tokens // (n_batch * n_tokens)
    n_micro = _most_at_once(n_batch, n_tokens * task.whole.language.vocab_size)
    trained_on = with_repeated(task.windows, settings.repeated_share, settings.seed)
    windows = _Windows(trained_on, n_steps * n_batch, settings.seed)
    logger.info(
        "heal: %d steps of %d tokens, %.1f passes over %d windows",
        n_steps,
        n_batch * n_tokens,
        len(windows) / len(trained_on),
        len(trained_on),
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=n_micro,
        gradient_accumulation_steps=n_batch // n_micro,
        train_sampling_strategy="sequential",  # the windows are in a random order already
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        bf16=mixed,
        use_cpu=task.device.type == "cpu",
        dataloader_pin_memory=task.device.type == "cuda",
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=1,  # and the best
        load_best_model_at_end=True,
        metric_for_best_model="divergence",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # Trainer would spread batches over all GPUs
    trainer = _Trainer(
        pair, task, settings, n_batch * n_tokens, args=arguments, train_dataset=windows, eval_dataset=windows
    )
    trainer.remove_callback(PrinterCallback)
    if settings.patience is not None:
        trainer.add_callback(_Patience(settings.patience, before))
    trainer.add_callback(_Reporting(task))
    return trainer


@torch.no_grad()
def _runs_in_both(student: nn.Module, windows: Tensor) -> bool:
    """Whether matrix products in bfloat16 suit the model's code, with the rest in float32; DBRX's adds the one to the
    other in place."""
    try:
        with torch.autocast(windows.device.type, torch.bfloat16):
            student(windows, use_cache=False)
    except RuntimeError as error:
        if "scalar type" not in str(error):
            raise
        logger.warning("heal: the model's code does not run in bfloat16 and float32 at once; trained in float32")
        return False
    return True


def _most_at_once(n_windows: int, logits_per_window: int) -> int:
    """The largest divisor of a batch whose logits are few enough."""
    fitting: Sequence[int] = [
        n for n in range(1, n_windows + 1) if n_windows % n == 0 and n * logits_per_window <= LOGITS_AT_ONCE
    ]
    return max(fitting, default=1)


def _last(folder: Path) -> str | None:
    """The newest complete checkpoint; its state is what Trainer writes last."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_json(path / STATE)]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
