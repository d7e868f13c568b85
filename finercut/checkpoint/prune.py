"""From a trajectory and a budget to a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

import finercut
from finercut.checkpoint.records import PruneReport
from finercut.model.checks import read_config
from finercut.model.loading import Sizes, sizes, write_pruned
from finercut.model.remote_code import trusts_code
from finercut.model.tensors import weights_bytes, weights_sha256
from finercut.selection.settings import Budget
from finercut.selection.trajectory import Removal, Trajectory, removals_within
from finercut.sublayers import Sublayer
from finercut.system.staging import staged
from pipelines import paths

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [finercut, pruned]
---

# {source}, less {n_removed} of {n_sublayers} sublayers

Pruned without training by FinerCut (arXiv 2405.18218): one by one, the sublayer whose removal changed the output
distribution least was taken out. The removed weights are gone from this checkpoint.

| | share of the whole model |
|---|---|
| sublayers | {shares.sublayers:.1%} |
| parameters | {shares.parameters:.1%} |
| KV cache | {shares.kv_cache:.1%} |

Speed-up depends on engine, hardware and load; it is measured in the registered version's `throughput.json`.

- Whole model: {source}, revision `{revision}`, weights sha256 `{whole_sha256}`
- Attention removed in blocks: {attention}
- MLP removed in blocks: {mlp}
- {divergence} divergence from the whole model: {last.divergence:.4f} on the calibration tokens
  (sha256 `{calibration_sha256}`), {last.held_out_divergence:.4f} on held-out tokens

## Load

{loading}
"""

_LOADING = """\
With [transformers](https://github.com/huggingface/transformers) and `pip install finercut`:

```python
import finercut
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Without finercut, `from_pretrained("PATH", trust_remote_code=True)` uses the one Python file in this directory.

## Serve

```sh
pip install "finercut[cuda]"     # or finercut[cpu]; vLLM finds the plugin by itself
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


def prune(whole_directory: Path, trajectory: Trajectory, budget: Budget, directory: Path) -> PruneReport:
    """Write the pruned checkpoint that a budget buys. Searches nothing.

    Args:
        directory: replaced if it exists, once the new checkpoint is complete.

    Raises:
        FileNotFoundError: no whole model.
        ValueError: the trajectory belongs to another model, or does not reach the budget.
    """
    if not (whole_directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {whole_directory}: run `finercut fetch` first")
    provenance = trajectory.provenance
    whole_sha256 = weights_sha256(whole_directory)
    if whole_sha256 != provenance.model_sha256:
        raise ValueError(
            f"the trajectory was searched on weights {provenance.model_sha256[:12]}, "
            f"{whole_directory} has {whole_sha256[:12]}: run `finercut search` again"
        )
    config = read_config(whole_directory)
    if provenance.n_blocks != config.num_hidden_layers:
        raise ValueError(
            f"the trajectory is of a model of {provenance.n_blocks} blocks, {whole_directory} has "
            f"{config.num_hidden_layers}: run `finercut search` again"
        )
    own_code = trusts_code(whole_directory)
    measured = sizes(config, trust_remote_code=own_code)
    n_removals = removals_within(trajectory, budget, measured.parameters, measured.n_parameters)
    taken = trajectory.first(n_removals)
    removed, last = taken.sublayers(), taken.removals[-1]
    origin = {
        "source": provenance.model_source,
        "revision": provenance.model_revision,
        "whole_sha256": whole_sha256,
        "calibration_sha256": provenance.calibration_sha256,
        "divergence": {provenance.divergence: last.divergence, "held_out": last.held_out_divergence},
        "version": finercut.__version__,
    }
    with staged(directory) as partial:
        card = _card(taken, removed, measured, last, own_code)
        write_pruned(whole_directory, removed, partial, origin, card)
        # One of an earlier checkpoint must not vouch for this one, should the process end before the stage's last line.
        paths.report("prune").unlink(missing_ok=True)
    kv_bytes = measured.kv_bytes_per_token
    return PruneReport(
        n_removals=n_removals,
        removed=[str(s) for s in removed],
        n_removed_sublayers=len(removed),
        n_sublayers=len(measured.parameters),
        shares=measured.shares(removed),
        divergence=last.divergence,
        held_out_divergence=last.held_out_divergence,
        whole_parameters=measured.n_parameters,
        pruned_parameters=measured.n_parameters - sum(measured.parameters[s] for s in removed),
        whole_bytes=weights_bytes(whole_directory),
        pruned_bytes=weights_bytes(directory),
        whole_kv_bytes_per_token=sum(kv_bytes.values()),
        pruned_kv_bytes_per_token=sum(kv_bytes.values()) - sum(kv_bytes[s] for s in removed),
        sha256=weights_sha256(directory),
    )


def _card(taken: Trajectory, removed: list[Sublayer], measured: Sizes, last: Removal, own_code: bool) -> str:
    provenance = taken.provenance
    blocks = {
        kind: ", ".join(str(s.block) for s in sorted(removed) if s.kind == kind) or "none"
        for kind in ("attention", "mlp")
    }
    return _CARD.format(
        source=provenance.model_source,
        revision=provenance.model_revision,
        whole_sha256=provenance.model_sha256,
        calibration_sha256=provenance.calibration_sha256,
        divergence=provenance.divergence,
        n_removed=len(removed),
        n_sublayers=len(measured.parameters),
        shares=measured.shares(removed),
        last=last,
        loading=_LOADING_OWN_CODE if own_code else _LOADING,
        **blocks,
    )
