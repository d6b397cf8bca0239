"""What the module trees of this folder share: decoder, head, attention, rotary tables.

Each tree keeps the operations of the published forward pass in their order, down to
which of them slice, copy or compute in fp32, because they decide what autograd saves.
Loss, cache and masks are those of transformers: what its loops and PEFT expect.

Shapes: B batch, T tokens, H hidden, A attention heads, G key and value heads, D head
width, V vocabulary.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from memplan.errors import InputError


class SelfInitialized(nn.Module, ABC):
    """A module that knows the first values of the tensors it holds itself."""

    @abstractmethod
    def initialize(self) -> None:
        """Fill parameters and buffers in place."""


class Tree(PreTrainedModel):
    """What transformers must know of every model here."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' own)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialized):
            module.initialize()


class Decoder(Tree, ABC):
    """An embedding, blocks and a final norm, under the names of a subclass."""

    gradient_checkpointing = False

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """What the first block reads, (B, T, H)."""

    @abstractmethod
    def locate(self, position_ids: Tensor) -> Tensor:
        """What every block is told of where its tokens stand."""

    @abstractmethod
    def body(self) -> tuple[nn.ModuleList, nn.Module]:
        """The blocks and the norm after them."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0913 (the signature that transformers' loops call)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states (B, T, H) of token ids (B, T) or embeddings (B, T, H)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids and inputs_embeds are both None: give one")
            inputs_embeds = self.embed(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # Only positions that are given can tell packed sequences, whose search reads
        # values that a meta tensor does not have.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = _next_positions(inputs_embeds, past_key_values)
        positions = self.locate(position_ids)
        blocks, norm = self.body()
        hidden_states = inputs_embeds
        for block in blocks:
            # Reentrant checkpointing sees the gradient of positional arguments only.
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                positions=positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=norm(hidden_states), past_key_values=past_key_values
        )


class CausalModel(Tree, GenerationMixin, ABC):
    """A `Decoder` and a head that turns its hidden states into logits."""

    @abstractmethod
    def project(self, hidden_states: Tensor) -> Tensor:
        """Logits (B, T, V) of final hidden states (B, T, H)."""

    @can_return_tuple
    def forward(  # noqa: PLR0913 (the signature that transformers' loops call)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss where labels (B, T) are given."""
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.project(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _next_positions(inputs_embeds: Tensor, past_key_values: Cache | None) -> Tensor:
    """Indices (1, T) of tokens that follow those in the cache."""
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    indices = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    return (indices + seen).unsqueeze(0)


def share(field: str, parts: int, whole_field: str, whole: int) -> int:
    """An even part of a size in the configuration, such as D of H in A heads.

    Raises InputError, naming both fields, where the parts cannot be even.
    """
    if parts < 1 or whole % parts:
        remedy = f"let it divide {whole_field} evenly"
        raise InputError(field, parts, f"does not divide {whole_field} {whole}", remedy)
    return whole // parts


def expand_heads(heads: Tensor, num_repeats: int) -> Tensor:
    """Key or value heads (B, G, T, D), each repeated for the queries of its group."""
    if num_repeats == 1:
        return heads
    batch, groups, length, width = heads.shape
    expanded = heads.unsqueeze(2).expand(batch, groups, num_repeats, length, width)
    return expanded.flatten(1, 2)


def eager_attention(  # noqa: PLR0913 (the signature of transformers' AttentionInterface)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelt out: outputs (B, T, A, D) and weights (B, A, T, T), fp32 softmax.

    Queries, keys and values are (B, A, T, D): grouped heads come expanded, as all the
    published code here does before any kind of attention.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GatedMLP(nn.Module):
    """The gated feed-forward layer of Baichuan2 and MiniCPM, as in Llama."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(hidden_states))
        output: Tensor = self.down_proj(gate * self.up_proj(hidden_states))
        return output


def inverse_frequencies(
    width: int, base: float, device: torch.device | None = None
) -> Tensor:
    """Angles per position that turn `width` features, (width / 2,), in fp32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / base**exponents


def rotate_half(features: Tensor) -> Tensor:
    """The features (..., D) turned by a right angle, half paired with half."""
    first, second = features.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class RotaryTables(SelfInitialized):
    """Cosines and sines of every position of the context, (context, D) each, in fp32.

    Every attention layer of Baichuan2 and of MiniCPM holds a pair of its own.
    """

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, width: int, num_positions: int, base: float) -> None:
        super().__init__()
        self.width = width
        self.base = base
        self.tabulate(num_positions)

    def tabulate(self, num_positions: int, device: torch.device | None = None) -> None:
        """Replace the tables by ones for positions 0 to `num_positions` - 1."""
        frequencies = inverse_frequencies(self.width, self.base, device)
        indices = torch.arange(num_positions, dtype=torch.float32, device=device)
        angles = torch.outer(indices, frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def initialize(self) -> None:
        self.tabulate(len(self.cos_cached), self.cos_cached.device)

    def forward(
        self, position_ids: Tensor, length: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rows (B, 1, T, D) of both tables, grown first if `length` exceeds them."""
        if length > len(self.cos_cached):
            self.tabulate(length, self.cos_cached.device)
        cos = self.cos_cached[:length].to(dtype)
        sin = self.sin_cached[:length].to(dtype)
        return cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
