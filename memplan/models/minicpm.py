"""MiniCPM-2B: a Llama body with scaled embeddings, residuals and logits.

From modeling_minicpm.py of openbmb/MiniCPM-2B-sft-bf16. Its tensors are Llama's but for
the fp32 rotation of queries and keys, a norm that saves its input as it came, and the
scaled copies, which multiplying by a number does not save. The parameters of scaled
rotary embeddings move no memory: they are kept, not applied.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memplan.models.layers import (
    CausalModel,
    Decoder,
    GatedMLP,
    RotaryTables,
    eager_attention,
    expand_heads,
    rotate_half,
    share,
)


class MiniCPMConfig(PreTrainedConfig):
    """The configuration of MiniCPM, by the keys of its config.json."""

    model_type = "minicpm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own)

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    scale_emb: float = 1
    dim_model_base: int = 1
    scale_depth: float = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class MiniCPMRMSNorm(nn.Module):
    """Scale by the root mean square, cast back, then weigh."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        scaled = hidden_states * torch.rsqrt(variance + self.eps)
        return scaled.to(hidden_states.dtype) * self.weight


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Queries and keys (B, A, T, D) at their positions, rotated as fp32 copies."""
    copies = [heads.to(torch.float32) for heads in (query, key)]
    rotated = [heads * cos + rotate_half(heads) * sin for heads in copies]
    return [heads.to(key.dtype) for heads in rotated]


class MiniCPMAttention(nn.Module):
    """Self-attention as in Llama, with rotary tables of its own."""

    is_causal = True

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        num_groups = config.num_key_value_heads or num_heads
        self.head_dim = share(
            "num_attention_heads", num_heads, "hidden_size", hidden_size
        )
        self.num_repeats = share(
            "num_key_value_heads", num_groups, "num_attention_heads", num_heads
        )
        groups_size, bias = num_groups * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, groups_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, groups_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        base = config.rope_parameters["rope_theta"]
        self.rotary_emb = RotaryTables(
            self.head_dim, config.max_position_embeddings, base
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
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = key.shape[2]
        if past_key_values is not None:
            length += past_key_values.get_seq_length(self.layer_idx)
        # MiniCPMAttention asks for fp32 tables, MiniCPMSdpaAttention for the values'.
        eager = self.config._attn_implementation == "eager"
        dtype = torch.float32 if eager else value.dtype
        query, key = _rotate(query, key, *self.rotary_emb(positions, length, dtype))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query,
            expand_heads(key, self.num_repeats),
            expand_heads(value, self.num_repeats),
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class MiniCPMDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, scaled down before they join the residual."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MiniCPMAttention(config, layer_idx)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act
        )
        self.input_layernorm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniCPMRMSNorm(
            config.hidden_size, config.rms_norm_eps
        )
        self.residual_scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = residual + hidden_states * self.residual_scale
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states * self.residual_scale


class MiniCPMModel(Decoder):
    """The body of MiniCPM."""

    config: MiniCPMConfig
    config_class = MiniCPMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniCPMDecoderLayer"]  # noqa: RUF012 (transformers' own)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MiniCPMDecoderLayer,
        "attentions": MiniCPMAttention,
    }

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            MiniCPMDecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = MiniCPMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embed_tokens(input_ids)
        return embeddings * self.config.scale_emb

    def locate(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def body(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm


class MiniCPMForCausalLM(CausalModel):
    """MiniCPM with its language-model head, tied to the embedding."""

    config: MiniCPMConfig
    config_class = MiniCPMConfig
    base_model_prefix = "model"
    _tied_weights_keys = {  # noqa: RUF012 (transformers' own)
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def project(self, hidden_states: Tensor) -> Tensor:
        width_scale = self.config.hidden_size / self.config.dim_model_base
        logits: Tensor = self.lm_head(hidden_states / width_scale)
        return logits
