"""InternLM2: a Llama body with grouped, fused attention inputs under its own names.

From modeling_internlm2.py of internlm/internlm2-7b. Queries are copied out of the fused
projection and rotated again; the values that attention saves are an expanded copy.
Cosines and sines are computed in every layer. Scaled rotary embeddings turn positions
beyond the context and move no memory: their parameters are kept, not applied.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memplan.models.layers import (
    CausalModel,
    Decoder,
    SelfInitialized,
    eager_attention,
    expand_heads,
    inverse_frequencies,
    rotate_half,
    share,
)


class InternLM2Config(PreTrainedConfig):
    """The configuration of InternLM2, by the keys of its config.json."""

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own)

    vocab_size: int = 103_168
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
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    bias: bool = True
    rope_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class InternLM2RMSNorm(nn.Module):
    """Scale an fp32 copy by its root mean square, cast back, then weigh."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states.to(dtype)


class InternLM2RotaryEmbedding(SelfInitialized):
    """Cosines and sines of given positions, computed when they are asked for."""

    inv_freq: Tensor

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width = width
        self.base = base
        frequencies = inverse_frequencies(width, base)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def initialize(self) -> None:
        frequencies = inverse_frequencies(self.width, self.base, self.inv_freq.device)
        self.inv_freq.copy_(frequencies)

    @torch.no_grad()
    def forward(
        self, position_ids: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Both (B, 1, T, D), computed in fp32 and cast to `dtype`."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class InternLM2Attention(nn.Module):
    """Self-attention on one projection: each group's queries, its key, its value."""

    is_causal = True

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        num_heads = config.num_attention_heads
        num_groups = config.num_key_value_heads or num_heads
        self.head_dim = share(
            "num_attention_heads", num_heads, "hidden_size", config.hidden_size
        )
        self.num_repeats = share(
            "num_key_value_heads", num_groups, "num_attention_heads", num_heads
        )
        fused = (num_heads + 2 * num_groups) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, fused, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        base = config.rope_parameters["rope_theta"]
        self.rotary_emb = InternLM2RotaryEmbedding(self.head_dim, base)

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
        cos, sin = self.rotary_emb(positions, value.dtype)
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
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
            **kwargs,
        )
        return self.wo(output.flatten(2)), weights

    def _heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, A, T, D), copied; keys and values (B, G, T, D), views."""
        fused = self.wqkv(hidden_states)
        grouped = fused.unflatten(-1, (-1, self.num_repeats + 2, self.head_dim))
        # The queries of all groups do not lie evenly spaced: flattening copies them.
        query = grouped[..., : self.num_repeats, :].flatten(2, 3)
        key, value = grouped[..., -2, :], grouped[..., -1, :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class InternLM2MLP(nn.Module):
    """The gated feed-forward layer: w1 is the gate, w3 goes up, w2 goes down."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self.act_fn(self.w1(hidden_states))
        output: Tensor = self.w2(gate * self.w3(hidden_states))
        return output


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.attention_norm(hidden_states)
        hidden_states, _ = self.attention(hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.ffn_norm(hidden_states)
        hidden_states = self.feed_forward(hidden_states)
        return residual + hidden_states


class InternLM2Model(Decoder):
    """The body of InternLM2."""

    config: InternLM2Config
    config_class = InternLM2Config
    base_model_prefix = "model"
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012 (transformers' own)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": InternLM2DecoderLayer,
        "attentions": InternLM2Attention,
    }

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.tok_embeddings(input_ids)
        return embeddings

    def locate(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def body(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm


class InternLM2ForCausalLM(CausalModel):
    """InternLM2 with its language-model head, which is called `output`."""

    config: InternLM2Config
    config_class = InternLM2Config
    base_model_prefix = "model"
    _input_embed_layer = "tok_embeddings"
    _tied_weights_keys = {  # noqa: RUF012 (transformers' own)
        "output.weight": "model.tok_embeddings.weight"
    }

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    def project(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.output(hidden_states)
        return logits
