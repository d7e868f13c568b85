"""Lets the whole model write calibration text itself, and drops what it writes badly.

Such text is near to what the model was trained on, whatever that was, and needs no corpus. A document starts from a
token or from a prompt in the chat template; repetitive documents and those that the model itself finds least likely are
dropped. The same settings, model and versions give the same documents.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finercut.model.caches import forward
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.sources.settings import ModelText
from finercut.sources.texts import Texts
from finercut.tokens import repetition

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("finercut")

_END_OF_TEXT = "<|endoftext|>"
# Of the tokens that are needed, what documents may lose when their text is tokenised again.
_LOSS = 0.05
# Tokens among which a draw is tried first; more in rows where these have less than top_p together.
N_LIKELY = 1024
# Where less than this share of the documents can be kept, or they are shorter than this, the source gives up.
_LEAST_KEPT = 0.25
_SHORTEST = 8


@dataclass(frozen=True)
class Draft:
    """What the model wrote from one beginning."""

    beginning: list[int]
    written: list[int]
    end: list[int]
    """The token that ended it; none where it was cut off."""
    perplexity: float
    """Of what is written, under the model itself, at temperature 1; infinite where nothing is."""

    @property
    def repetition(self) -> float:
        return repetition(self.written)


def beginnings(settings: ModelText, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids that documents start from, in turn. Asks the tokenizer alone, so before anything expensive.

    Raises:
        ValueError: the tokenizer has no such token, or no chat template.
    """
    if settings.prompts:
        if tokenizer.chat_template is None:
            raise ValueError("calibrate has prompts for the model, whose tokenizer has no chat template: take them out")
        from jinja2 import TemplateError

        messages = [[{"role": "user", "content": prompt}] for prompt in settings.prompts]
        try:
            return [
                list(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in messages
            ]
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the chat template does not take the prompts in calibrate: {reason}") from error
    if settings.start is not None:
        token = tokenizer.get_vocab().get(settings.start)
        if token is None:
            raise ValueError(f"calibrate has start: {settings.start!r}, which is no token of the model's tokenizer")
        return [[token]]
    # A chat model's BOS and EOS begin and end messages; between the documents it was trained on lies another token.
    between = tokenizer.get_vocab().get(_END_OF_TEXT)
    token = next((t for t in (between, tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if token is None:
        raise ValueError(
            "the model's tokenizer has neither BOS nor EOS to start a text from: name a token as the start of the "
            "source of kind model in calibrate"
        )
    return [[token]]


def model_texts(settings: ModelText, directory: ModelDirectory, n_tokens_needed: int, n_tokens: int) -> Texts:
    """Documents that the model writes until they have `n_tokens_needed` tokens.

    Args:
        n_tokens: of a window, the default length of a document.

    Raises:
        ValueError: no such start or device; or too little is left of what the model writes.
    """
    tokenizer = directory.tokenizer
    starts = beginnings(settings, tokenizer)
    if (highest := max(map(max, starts))) >= directory.language.vocab_size:
        raise ValueError(
            f"the chat template writes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), for which the "
            "model has no embedding: take the prompts out of calibrate, or a tokenizer that is the model's"
        )
    max_tokens = settings.max_tokens or n_tokens
    longest = max(map(len, starts)) + max_tokens
    if longest > directory.context:
        raise ValueError(
            f"a prompt and {max_tokens} tokens of the model's own text are {longest} tokens, its context has "
            f"{directory.context}: lower max_tokens in calibrate"
        )
    device = device_of(settings.device)
    if _uses_vllm(settings, device):
        write = _Vllm(settings, directory, max_tokens, longest)
    else:
        write = _Transformers(settings, directory, device, max_tokens)
    started = time.monotonic()
    # No document is cut for two uses: what is left of those that calibration and the held-out windows end in is lost.
    wanted = n_tokens_needed * (1 + _LOSS) + 2 * max_tokens
    n_longest = max_tokens + (min(map(len, starts)) if settings.prompts else 0)
    n_drafts = math.ceil(wanted / n_longest / (1 - settings.drop_perplexity))
    drafts: list[Draft] = []
    with _bar(n_drafts) as bar:
        while True:
            n_before, n = len(drafts), min(settings.batch_size, n_drafts - len(drafts))
            batch = list(islice(cycle(starts), n_before, n_before + n))
            drafts += write(batch, n_before)
            bar.update(len(batch))
            if len(drafts) < n_drafts:
                continue
            kept = keep(drafts, settings)
            n_written = sum(len(_whole(draft, settings)) for draft in kept)
            if n_written >= wanted:
                break
            n_left = len(kept) / (1 - settings.drop_perplexity)
            if not kept or n_left < _LEAST_KEPT * len(drafts) or n_written < _SHORTEST * len(kept):
                raise ValueError(_too_little(drafts, kept, wanted, settings))
            n_drafts = math.ceil(len(drafts) * wanted / n_written)
            bar.total = n_drafts
    documents = [tokenizer.decode(_whole(draft, settings)).strip() for draft in kept]
    logger.info(
        "calibrate: the model wrote %d documents of %d tokens in %.0f s, %d are kept",
        len(drafts),
        sum(len(draft.written) for draft in drafts),
        time.monotonic() - started,
        len(kept),
    )
    digest = hashlib.sha256("\0".join(documents).encode("utf-8", "replace"))
    return Texts(documents, "\n\n", settings.label, digest.hexdigest())


def keep(drafts: Sequence[Draft], settings: ModelText) -> list[Draft]:
    """Those that are not empty and not repetitive, less the share with the highest perplexity; in their order."""
    sound = [draft for draft in drafts if draft.written and draft.repetition <= settings.max_repetition]
    n_dropped = int(settings.drop_perplexity * len(sound) + 1e-9)
    likeliest = sorted(range(len(sound)), key=lambda i: sound[i].perplexity)[: len(sound) - n_dropped]
    return [sound[i] for i in sorted(likeliest)]


def _too_little(drafts: Sequence[Draft], kept: Sequence[Draft], wanted: float, settings: ModelText) -> str:
    n_empty = sum(not draft.written for draft in drafts)
    n_repetitive = sum(draft.repetition > settings.max_repetition for draft in drafts)
    n_written = sum(len(_whole(draft, settings)) for draft in kept)
    return (
        f"of {len(drafts)} documents that the model wrote, {n_empty} are empty and {n_repetitive} repeat themselves; "
        f"{len(kept)} with {n_written} tokens are left, {wanted:.0f} are needed: try "
        "another start, temperature or prompts, or raise max_repetition in calibrate"
    )


def _whole(draft: Draft, settings: ModelText) -> list[int]:
    """The tokens of its text: an answer keeps its question, and that it ends."""
    return [*draft.beginning, *draft.written, *draft.end] if settings.prompts else draft.written


def _bar(n_drafts: int):
    from tqdm import tqdm

    return tqdm(total=n_drafts, desc="writing", unit="document", disable=None, leave=False)


def _uses_vllm(settings: ModelText, device: torch.device) -> bool:
    if settings.engine == "auto":
        return device.type == "cuda" and find_spec("vllm") is not None
    if settings.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError("calibrate asks for engine: vllm, which is not installed: take transformers or auto")
    return settings.engine == "vllm"


def _stops(starts_with: int | None, tokenizer: PreTrainedTokenizerBase, ends: int | Sequence[int] | None) -> set[int]:
    """Tokens that end a document."""
    listed = [ends] if isinstance(ends, int) else list(ends or [])
    return {token for token in (starts_with, tokenizer.eos_token_id, *listed) if token is not None}


class _Transformers:
    """Writes with transformers, one batch at a time."""

    def __init__(self, settings: ModelText, directory: ModelDirectory, device: torch.device, max_tokens: int) -> None:
        from finercut.model.loading import load_whole

        self.settings, self.max_tokens = settings, max_tokens
        self.model = load_whole(directory, dtype_of("auto", device), device)
        self.tokenizer = directory.tokenizer

    def __call__(self, starts: Sequence[list[int]], n_before: int) -> list[Draft]:
        # Each document has numbers of its own, so that it does not depend on how many are asked for.
        seeds = [self.settings.seed * 1_000_003 + n_before + place for place in range(len(starts))]
        chances = [torch.rand(self.max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        drafts: dict[int, Draft] = {}
        # Recurrent states take padding in.
        together = [list(range(len(starts)))] if not self.model._is_stateful else _of_one_length(starts)
        for places in together:
            rows = [starts[place] for place in places]
            drafts |= zip(places, self._write(rows, torch.stack([chances[i] for i in places], -1)), strict=True)
        return [drafts[place] for place in sorted(drafts)]

    def _write(self, starts: Sequence[list[int]], chances: Tensor) -> Iterator[Draft]:
        device = self.model.device
        once = None if self.settings.prompts else starts[0][0]
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        stops = torch.tensor(sorted(_stops(once, self.tokenizer, ends)), device=device)
        ids, log_p = sample(
            self.model, starts, chances.to(device), stops, self.settings.temperature, self.settings.top_p
        )
        ended = torch.isin(ids, stops)
        for row, beginning in enumerate(starts):
            n = int(ended[row].int().argmax()) if ended[row].any() else ids.shape[1]
            perplexity = math.exp(-float(log_p[row, :n].double().mean())) if n else math.inf
            yield Draft(list(beginning), ids[row, :n].tolist(), ids[row, n : n + 1].tolist(), perplexity)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    starts: Sequence[list[int]],
    chances: Tensor,
    stops: Tensor,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """Write on from `starts`, until each row has met one of `stops` or as many tokens are written as there are chances.

    Args:
        starts: token ids; shorter ones are padded at the left, which a recurrent model must not be given
        chances: uniform numbers that decide each token, (tokens to write, batch)

    Returns:
        (batch, written) token ids, and their log-probabilities at temperature 1, nats.
    """
    longest = max(map(len, starts))
    n_padded = torch.tensor([longest - len(start) for start in starts], device=model.device)
    rows = torch.tensor([[start[0]] * (longest - len(start)) + start for start in starts], device=model.device)
    ids, log_p, cache, done = [], [], None, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    n_seen, padded = 0, bool(n_padded.any())
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    for chance in chances:
        places = torch.arange(n_seen + rows.shape[1], device=rows.device) - n_padded[:, None]
        # Without padding a model chooses its fastest attention.
        options = {"attention_mask": (places >= 0).long()} if padded else {}
        if padded and has_positions:
            options["position_ids"] = places[:, n_seen:].clamp(min=0)
        output, cache = forward(model, rows, cache, **options)
        n_seen += rows.shape[1]
        logits = output.logits[:, -1].float()
        rows = draw(logits / temperature, chance, top_p)
        ids.append(rows)
        log_p.append(logits.log_softmax(-1).gather(-1, rows))
        done |= torch.isin(rows[:, 0], stops)
        if done.all():
            break
    return torch.cat(ids, -1), torch.cat(log_p, -1)


def draw(logits: Tensor, chance: Tensor, top_p: float, n_likely: int = N_LIKELY) -> Tensor:
    """A token a row, (batch, 1): the one `chance` in [0, 1) falls on, of the likeliest that have `top_p` together.

    Args:
        n_likely: tokens to look for them among first; sorting all would take longer than the model.
    """
    every = logits.softmax(-1)
    n_likely = min(n_likely, every.shape[-1])
    likely = every.topk(n_likely).indices.sort().values
    p, order = every.gather(-1, likely).sort(descending=True, stable=True)
    order, total = likely.gather(-1, order), p.cumsum(-1)
    n_kept = (total - p < top_p).sum(-1, keepdim=True)
    mass = total.gather(-1, n_kept - 1)
    place = torch.searchsorted(total, chance[:, None] * mass, right=True)
    drawn = order.gather(-1, place.minimum(n_kept - 1))
    lacking = total[:, -1] < top_p
    if n_likely < every.shape[-1] and lacking.any():
        drawn[lacking] = draw(logits[lacking], chance[lacking], top_p, 4 * n_likely)
    return drawn


def _of_one_length(starts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Places of beginnings with as many tokens, so that no row has padding."""
    for length in sorted({len(start) for start in starts}):
        yield [place for place, start in enumerate(starts) if len(start) == length]


class _Vllm:
    """Writes with vLLM, all that is asked for at once."""

    def __init__(self, settings: ModelText, directory: ModelDirectory, max_tokens: int, longest: int) -> None:
        from vllm import LLM

        self.settings, self.max_tokens = settings, max_tokens
        self.tokenizer = directory.tokenizer
        self.llm = LLM(
            model=str(directory.path),
            seed=settings.seed,
            max_model_len=longest,
            enable_prefix_caching=False,
            trust_remote_code=directory.trusted,
        )

    def __call__(self, starts: Sequence[list[int]], n_before: int) -> list[Draft]:
        from vllm import SamplingParams

        once = None if self.settings.prompts else starts[0][0]
        stops = _stops(once, self.tokenizer, None)
        wishes = [
            SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.max_tokens,
                seed=self.settings.seed + n_before + place,
                logprobs=0,  # of the token itself, before temperature and top_p
                stop_token_ids=sorted(stops),
                detokenize=False,
            )
            for place in range(len(starts))
        ]
        answers = self.llm.generate([{"prompt_token_ids": start} for start in starts], wishes, use_tqdm=False)
        return [self._draft(start, answer.outputs[0], stops) for start, answer in zip(starts, answers, strict=True)]

    def _draft(self, start: list[int], answer: object, stops: set[int]) -> Draft:
        ids = list(answer.token_ids)
        log_p = [found[token].logprob for token, found in zip(ids, answer.logprobs, strict=True)]
        # vLLM keeps the token that ended the text, and also ends at those of the generation config.
        n = len(ids) - 1 if ids and (answer.finish_reason == "stop" or ids[-1] in stops) else len(ids)
        perplexity = math.exp(-sum(log_p[:n]) / n) if n else math.inf
        return Draft(start, ids[:n], ids[n:], perplexity)
