"""A small decoder that transformers has no code for."""

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig


class OwnAttention(nn.Module):
    """The mean of all tokens so far, mixed."""

    def __init__(self, size: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mix = nn.Linear(size, size)

    def forward(self, *, x, cache):
        if cache is not None:
            x, _ = (part.squeeze(1) for part in cache.update(x[:, None], x[:, None], self.layer_idx))
        counts = torch.arange(1, 1 + x.shape[1])[None, :, None]
        return self.mix(x.cumsum(1) / counts)


class OwnBlock(nn.Module):
    def __init__(self, size: int, layer_idx: int, attention_share: float) -> None:
        super().__init__()
        self.attention_share = attention_share
        self.pre, self.look = nn.LayerNorm(size), OwnAttention(size, layer_idx)
        self.widen, self.narrow, self.calm = nn.Linear(size, 2 * size), nn.Linear(2 * size, size), nn.LayerNorm(size)

    def forward(self, x, cache=None):
        x = x + self.attention_share * self.look(x=self.pre(x), cache=cache)[:, -x.shape[1] :]
        return (x + self.calm(self.narrow(self.widen(x))), None)


class OwnModel(PreTrainedModel):
    """As code of a repository's own might be: other names, a tuple handed on, an attention that returns a tensor."""

    config_class = OwnConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tower = nn.ModuleList(
            [OwnBlock(config.hidden_size, i, config.attention_share) for i in range(config.num_hidden_layers)]
        )
        self.other = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.table(input_ids)
        for block in self.tower:
            x = block(x, cache=past_key_values)[0]
        return CausalLMOutputWithPast(logits=x @ self.table.weight.T, past_key_values=past_key_values)
