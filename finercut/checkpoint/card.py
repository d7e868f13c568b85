"""The model card of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import metadata_load
from huggingface_hub.utils import yaml_dump
from yaml import YAMLError

from finercut.selection.selection import Selection
from finercut.sublayers import KINDS

if TYPE_CHECKING:
    from finercut.checkpoint.settings import Quantised
    from finercut.healing.fidelity import Fidelity

_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [finercut, pruned]
{inherited}---

# {source}, less {n_removed} of {n_sublayers} sublayers

{untrained} (arXiv 2405.18218): {chosen} were taken out. The removed weights are gone from this checkpoint.

| | saved of the whole model |
|---|---|
{shares}

Speed-up depends on engine, hardware and load; it is measured in the registered version's `throughput.json`.

- Whole model: {source}, revision `{revision}`, weights sha256 `{whole_sha256}`
- Attention removed in blocks: {attention}
- MLP removed in blocks: {mlp}
{measured}
## Load

{loading}
"""

_MEASURED = """\
- {divergence} divergence from the whole model: {last:.4f} on the calibration tokens
  (sha256 `{calibration_sha256}`), {held_out:.4f} on held-out tokens
"""

_MEASURED_ON_TEXT = """\
- negative log-likelihood of {of}: {last:.4f} nats per token, {held_out:.4f} on held-out ones
"""
_OF_THE_TEXT = {"perplexity": "the calibration text", "task": "the answers of the task's examples"}

_LOADING = """\
With [transformers](https://github.com/huggingface/transformers) and finercut, from the repository or wheel that this
checkpoint was made with:

```python
import finercut
from transformers import {auto}, Auto{reader}

model = {auto}.from_pretrained("PATH")
{name} = Auto{reader}.from_pretrained("PATH")
```

Without finercut, `from_pretrained("PATH", trust_remote_code=True)` uses the one Python file in this directory.

## Serve

With vLLM and finercut in one environment, vLLM finds the plugin by itself:

```sh
vllm serve PATH --host 127.0.0.1
```"""

_LOADING_OWN_CODE = """\
The whole model runs by Python code of its own, which this directory carries. Read it, then

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

vLLM has no model of it."""

_UNTRAINED = "Pruned without training by FinerCut"
_BY_OUTPUT = "the sublayers whose removal changed the output distribution least"

_HEALED = """\
## Healed

After pruning, weights were fitted to the whole model ({method}, {n_tokens:,} tokens). On held-out tokens, divergence
(js, nats per token) from the whole model fell from {before:.4f} to {after:.4f}, perplexity from {perplexity_before:.2f}
to {perplexity_after:.2f}.

"""

_QUANTISED = """\
## Quantised

The blocks' matrices are stored as {scheme} ({method}, llm-compressor; the format is compressed-tensors'). On held-out
tokens, divergence (js, nats per token) from the whole model went from {before:.4f} to {after:.4f}, perplexity from
{perplexity_before:.2f} to {perplexity_after:.2f}.

"""

# By the Auto class: the task, by the hub's name, and what makes a model's inputs.
_TASKS = {
    "AutoModelForCausalLM": ("text-generation", "Tokenizer"),
    "AutoModelForImageTextToText": ("image-text-to-text", "Processor"),
}
_TITLES = {"kv_cache": "KV cache", "memory": "memory under the load"}


def inherited(readme: Path) -> dict[str, Any]:
    """What the whole model's card says that holds for the pruned one: its licence, languages and base model."""
    try:
        said = metadata_load(readme) if readme.is_file() else None
    except (ValueError, YAMLError, UnicodeDecodeError):
        said = None  # a card is for people; one that cannot be read says nothing
    return {key: value for key, value in (said or {}).items() if key in _INHERITED}


def card(
    selection: Selection,
    shares: Mapping[str, float],
    n_sublayers: int,
    whole_sha256: str,
    own_code: bool,
    auto: str,
    metadata: Mapping[str, Any],
) -> str:
    """README.md of the checkpoint.

    Args:
        metadata: `inherited` from the whole model's card.
        shares: what is saved of each cost.
        own_code: the model runs by Python code of its own.
        auto: name of transformers' Auto class that loads it.
    """
    removed, origin, last = selection.sublayers, selection.origin, selection.removals[-1]
    of_text = origin is not None and origin.divergence in _OF_THE_TEXT
    measured = "\n"
    if of_text and last.divergence is not None:
        measured = _MEASURED_ON_TEXT.format(
            of=_OF_THE_TEXT[origin.divergence], last=last.divergence, held_out=last.held_out_divergence
        )
    elif origin is not None and last.divergence is not None:
        measured = _MEASURED.format(
            divergence=origin.divergence,
            last=last.divergence,
            held_out=last.held_out_divergence,
            calibration_sha256=origin.calibration_sha256,
        )
    blocks = {kind: ", ".join(str(s.block) for s in sorted(removed) if s.kind == kind) or "none" for kind in KINDS}
    source = origin.model_source if origin else ""
    task, reader = _TASKS.get(auto, ("any-to-any", "Processor"))
    loading = _LOADING_OWN_CODE if own_code else _LOADING.format(auto=auto, reader=reader, name=reader.lower())
    # Of the hub's repositories the revision is a commit; a path may look like the name of one.
    if origin and re.fullmatch(r"[0-9a-f]{40}", origin.model_revision) and "base_model" not in metadata:
        metadata = {**metadata, "base_model": source}
    by_output = origin is not None and selection.method.startswith("greedy") and not of_text
    return _CARD.format(
        untrained=_UNTRAINED,
        chosen=_BY_OUTPUT if by_output else f"the sublayers that `{selection.method}` chose",
        inherited=yaml_dump(dict(metadata)) if metadata else "",
        source=origin.model_source if origin else "Pruned model",
        revision=origin.model_revision if origin else "unknown",
        whole_sha256=whole_sha256,
        n_removed=len(removed),
        n_sublayers=n_sublayers,
        shares="\n".join(f"| {_TITLES.get(name, name)} | {share:.1%} |" for name, share in shares.items()),
        measured=measured,
        task=task,
        loading=loading,
        **blocks,
    )


def healed_card(card: str, method: str, n_tokens: int, before: Fidelity, after: Fidelity) -> str:
    """The card of a checkpoint that was healed.

    Args:
        card: of the pruned checkpoint.
    """
    section = _HEALED.format(
        method=method,
        n_tokens=n_tokens,
        before=before.divergence,
        after=after.divergence,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
    )
    head, load, rest = card.replace(_UNTRAINED, _UNTRAINED.replace(" without training", "")).partition("## Load\n")
    return f"{head}{section}{load}{rest}"


def quantised_card(card: str, settings: Quantised, before: Fidelity, after: Fidelity) -> str:
    """The card of a checkpoint that was quantised.

    Args:
        card: of the healed checkpoint.
    """
    section = _QUANTISED.format(
        scheme=settings.scheme + (f" in groups of {settings.group_size}" if settings.group_size else ""),
        method=settings.method,
        before=before.divergence,
        after=after.divergence,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
    )
    head, load, rest = card.partition("## Load\n")
    return f"{head}{section}{load}{rest}"
