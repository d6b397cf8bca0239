"""ChatGLM2-6B and ChatGLM3-6B: fused projections, two key and value groups.

From modeling_chatglm.py of THUDM/chatglm2-6b and chatglm3-6b. Rotary embeddings turn
neighbouring features of the first half of each head, from a table that every forward
computes over the whole context; keys and values are copied out to one per query head
before any kind of attention; norms multiply by their weight in fp32.

Batches come first here, where the published code puts tokens first, because
transformers' attention returns its output batch-first. What is saved is the same byte
for byte where the kernel lays its output out like the queries, as flash attention on
CUDA does; others make the published code copy it once more for batches above one.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memplan.models.layers import (
    CausalModel,
    Decoder,
    SelfInitialized,
    eager_attention,
    inverse_frequencies,
    share,
)

_ROTARY_BASE = 10_000.0
"""modeling_chatglm.py, RotaryEmbedding: its default, which no key changes."""


class ChatGLMConfig(PreTrainedConfig):
    """The configuration of ChatGLM2 and 3, by the keys of their config.json.

    The usual names read and write the same values. Without multi-query attention every
    head is a group of its own. As in the published code under PyTorch 2,
    `attention_dropout` drops nothing.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own)
    attribute_map = {  # noqa: RUF012
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_hidden_layers": "num_layers",
        "num_key_value_heads": "multi_query_group_num",
        "rms_norm_eps": "layernorm_epsilon",
        "vocab_size": "padded_vocab_size",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65_024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13_696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    fp32_residual_connection: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.multi_query_attention:
            self.multi_query_group_num = self.num_attention_heads
        super().__post_init__(**kwargs)


class RMSNorm(nn.Module):
    """Scale by the root mean square and weigh, both in fp32, then cast back."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        scaled = hidden_states * torch.rsqrt(variance + self.eps)
        return (self.weight * scaled).to(hidden_states.dtype)


def _norm(config: ChatGLMConfig) -> nn.Module:
    if config.rmsnorm:
        return RMSNorm(config.hidden_size, config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


class RotaryEmbedding(SelfInitialized):
    """Cosines and sines of the context, in the dtype of the model's weights."""

    inv_freq: Tensor

    def __init__(self, width: int, num_positions: int) -> None:
        super().__init__()
        self.width = width
        self.num_positions = num_positions
        frequencies = inverse_frequencies(width, _ROTARY_BASE)
        # Persistent and in the weights' dtype: its dtype decides that of the table.
        self.register_buffer("inv_freq", frequencies.to(torch.get_default_dtype()))

    def initialize(self) -> None:
        device = self.inv_freq.device
        self.inv_freq.copy_(inverse_frequencies(self.width, _ROTARY_BASE, device))

    def forward(self) -> Tensor:
        """The table (context, width / 2, 2), computed anew in fp32 and cast."""
        device = self.inv_freq.device
        frequencies = inverse_frequencies(self.width, _ROTARY_BASE, device)
        indices = torch.arange(self.num_positions, dtype=torch.float32, device=device)
        angles = torch.outer(indices, frequencies)
        table = torch.stack((angles.cos(), angles.sin()), dim=-1)
        return table.to(self.inv_freq.dtype)


def rotate_pairs(heads: Tensor, table: Tensor) -> Tensor:
    """Heads (B, T, A, D) whose first features turn in pairs by the angles of a table.

    The table (B, T, width / 2, 2) holds cosines and sines; features beyond its width
    pass unturned.
    """
    width = 2 * table.shape[-2]
    turning, passing = heads[..., :width], heads[..., width:]
    pairs = turning.reshape(*turning.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table[..., 0].unsqueeze(2), table[..., 1].unsqueeze(2)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((turned.flatten(-2), passing), dim=-1)


def _expand(heads: Tensor, num_repeats: int) -> Tensor:
    """Key or value heads (B, T, G, D), each copied for the queries of its group."""
    expanded = heads.unsqueeze(3).expand(-1, -1, -1, num_repeats, -1)
    return expanded.contiguous().flatten(2, 3)


class SelfAttention(nn.Module):
    """Self-attention on one projection: all queries, then all keys, then all values."""

    is_causal = True

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        num_heads, num_groups = config.num_attention_heads, config.multi_query_group_num
        self.num_repeats = share(
            "multi_query_group_num", num_groups, "num_attention_heads", num_heads
        )
        queries_size = num_heads * config.kv_channels
        groups_size = num_groups * config.kv_channels
        self.sizes = (queries_size, groups_size, groups_size)
        self.query_key_value = nn.Linear(
            config.hidden_size,
            sum(self.sizes),
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.dense = nn.Linear(
            queries_size, config.hidden_size, bias=config.add_bias_linear
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
        width = self.config.kv_channels
        mixed = self.query_key_value(hidden_states).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, width)) for part in mixed)
        query, key = rotate_pairs(query, positions), rotate_pairs(key, positions)
        if past_key_values is not None:
            key, value = (
                heads.transpose(1, 2)
                for heads in past_key_values.update(
                    key.transpose(1, 2), value.transpose(1, 2), self.layer_idx
                )
            )
        key, value = _expand(key, self.num_repeats), _expand(value, self.num_repeats)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            scaling=width**-0.5,
            **kwargs,
        )
        return self.dense(output.flatten(2)), weights


class MLP(nn.Module):
    """The gated feed-forward layer, gate and input in one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(
            config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear
        )
        self.dense_4h_to_h = nn.Linear(
            config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        output: Tensor = self.dense_4h_to_h(functional.silu(gate) * up)
        return output


class GLMBlock(GradientCheckpointingLayer):
    """Attention and feed-forward; the residual is taken before or after the norms."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        output, _ = self.self_attention(normed, **kwargs)
        hidden_states = self._join(hidden_states, normed, output)
        normed = self.post_attention_layernorm(hidden_states)
        return self._join(hidden_states, normed, self.mlp(normed))

    def _join(self, hidden_states: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        residual = normed if self.residual_after_norm else hidden_states
        dropped = functional.dropout(output, self.hidden_dropout, self.training)
        return residual + dropped


class Embedding(nn.Module):
    """Holds the word embeddings."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings: nn.Module = nn.Embedding(
            config.padded_vocab_size, config.hidden_size
        )


class GLMTransformer(nn.Module):
    """Holds the blocks and the norm after them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GLMBlock(config, index) for index in range(config.num_layers)
        )
        final = config.post_layer_norm
        self.final_layernorm = _norm(config) if final else nn.Identity()


class ChatGLMModel(Decoder):
    """The body of ChatGLM2 and 3, which also holds the output layer."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012 (transformers' own)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GLMBlock,
        "attentions": SelfAttention,
    }

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(
            config.kv_channels // 2, config.seq_length
        )
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(
            config.hidden_size, config.padded_vocab_size, bias=False
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embedding.word_embeddings(input_ids)
        if self.config.fp32_residual_connection:
            return embeddings.float()
        return embeddings

    def locate(self, position_ids: Tensor) -> Tensor:
        table: Tensor = self.rotary_pos_emb()
        return table[position_ids]

    def body(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.encoder.layers, self.encoder.final_layernorm


class ChatGLMForConditionalGeneration(CausalModel):
    """ChatGLM2 and 3 as a causal language model."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    def project(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.transformer.output_layer(hidden_states)
        return logits
