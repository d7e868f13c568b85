"""What a model writes after fixed prompts, for people to read."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finercut.evaluation.records import Sample
from finercut.evaluation.settings import Samples
from finercut.model.directory import ModelDirectory, quiet
from finercut.tokens import repetition


def check(settings: Samples, directory: ModelDirectory) -> None:
    """
    Raises:
        ValueError: a prompt has no tokens, or it and what is written exceed the model's context.
    """
    lengths = [len(directory.tokenizer(prompt)["input_ids"]) for prompt in settings.prompts]
    if 0 in lengths:
        raise ValueError(f"evaluate.samples: the prompt {settings.prompts[lengths.index(0)]!r} has no token")
    longest, context = max(lengths, default=0) + settings.n_tokens, directory.context
    if lengths and longest > context:
        raise ValueError(
            f"evaluate.samples: a prompt and n_tokens are {longest} tokens, the model's context has {context}: "
            "lower n_tokens"
        )


@torch.inference_mode()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Samples) -> list[Sample]:
    """The most likely continuation of each prompt; none from a model whose own code cannot generate."""
    if not settings.prompts or not model.can_generate():
        return []
    prompts = [tokenizer(prompt)["input_ids"] for prompt in settings.prompts]
    # Recurrent states take padding in.
    batches = [[ids] for ids in prompts] if model._is_stateful else [prompts]
    written = [ids for batch in batches for ids in _greedy(model, batch, settings.n_tokens)]
    return [
        Sample(
            prompt=prompt,
            text=tokenizer.decode(ids, skip_special_tokens=True),
            n_tokens=len(ids),
            repetition=repetition(ids),
        )
        for prompt, ids in zip(settings.prompts, written, strict=True)
    ]


def _greedy(model: PreTrainedModel, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """Up to an end token, which is the last."""
    longest = max(map(len, prompts))
    given = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # What is not said here, generate() takes from the model's own settings, a penalty of repetition among it.
    settings = GenerationConfig(
        max_new_tokens=n_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=(ends or [0])[0],
    )
    with quiet():
        ids = model.generate(given, attention_mask=seen, generation_config=settings)[:, longest:].tolist()
    return [next((row[: i + 1] for i, token in enumerate(row) if token in ends), row) for row in ids]
