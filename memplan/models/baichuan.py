"""Baichuan2-7B: a Llama body with one packed attention input and a normalised head.

From modeling_baichuan.py of baichuan-inc/Baichuan2-7B-Base. Three things set its memory
apart from Llama's: keys and queries are rotated in fp32, the values that attention
saves are a view of the packed projection and keep all of it, and the head normalises
its weight in every training forward. The z-loss, of weight 0 there, is not computed.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, initialization
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memplan.models.layers import (
    CausalModel,
    Decoder,
    GatedMLP,
    RotaryTables,
    SelfInitialized,
    eager_attention,
    rotate_half,
    share,
)

_ROTARY_BASE = 10_000.0
"""modeling_baichuan.py, RotaryEmbedding: its default, which no key changes."""


class BaichuanConfig(PreTrainedConfig):
    """The configuration of Baichuan2-7B, by the keys of its config.json."""

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own)
    attribute_map = {"num_key_value_heads": "num_attention_heads"}  # noqa: RUF012

    vocab_size: int = 125_696
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """Scale by the root mean square, cast to the weight's dtype if that is half."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Queries and keys (B, A, T, D) at their positions, rotated in fp32."""
    rotated = [
        heads.float() * cos + rotate_half(heads.float()) * sin for heads in (query, key)
    ]
    return [heads.to(query.dtype) for heads in rotated]


class Attention(nn.Module):
    """Self-attention whose queries, keys and values come from one projection."""

    is_causal = True

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = share(
            "num_attention_heads",
            config.num_attention_heads,
            "hidden_size",
            config.hidden_size,
        )
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = RotaryTables(
            self.head_dim, config.max_position_embeddings, _ROTARY_BASE
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H), and the weights where the attention gives them."""
        query, key, value = self._heads(hidden_states)
        length = key.shape[2]
        if past_key_values is not None:
            length += past_key_values.get_seq_length(self.layer_idx)
        cos, sin = self.rotary_emb(positions, length, torch.float32)
        query, key = _rotate(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def _heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, A, T, D), all views of the packed projection."""
        packed = self.W_pack(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        packed = packed.permute(2, 0, 3, 1, 4)
        # Three selections: each one's backward fills a gradient of the packed size.
        return packed[0], packed[1], packed[2]


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class NormHead(SelfInitialized):
    """Logits against rows of unit length.

    Training normalises a copy of the weight (V, H) in every forward; the first forward
    of evaluation normalises the weight itself.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.normalized = False
        self.initialize()

    def initialize(self) -> None:
        initialization.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.training:
            self.normalized = False
            weight = functional.normalize(self.weight)
            return functional.linear(hidden_states, weight)
        if not self.normalized:
            self.weight.data = functional.normalize(self.weight.data)
            self.normalized = True
        return functional.linear(hidden_states, self.weight)


class BaichuanModel(Decoder):
    """The body of Baichuan2-7B."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers' own)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DecoderLayer,
        "attentions": Attention,
    }

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embed_tokens(input_ids)
        return embeddings

    def locate(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def body(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm


class BaichuanForCausalLM(CausalModel):
    """Baichuan2-7B with its language-model head."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    base_model_prefix = "model"

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def project(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_states)
        return logits
