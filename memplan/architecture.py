"""`Architecture`: what a model is made of, read off its own module tree.

Blocks that repeat are held once with the layers they stand for. Every parameter is held
exactly once, as the weight or bias of a linear, as stacked experts, or by its shape.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PARAMETER_KINDS = (
    "embedding",
    "attention",
    "mlp",
    "experts",
    "router",
    "norm",
    "head",
    "other",
)
"""What a parameter belongs to; counts are given by these kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer: y = x W^T + b."""

    path: str
    """Path of the module: within its block, or within the model outside of blocks."""
    in_features: int
    out_features: int
    bias: bool
    kind: str
    """One of PARAMETER_KINDS: attention, mlp, router, head or other."""
    transposed: bool = False
    """Whether the weight is stored (in_features, out_features): GPT-2's Conv1D."""

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        return self.num_weights + self.bias * self.out_features


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A parameter that no linear layer holds, such as a norm's scale."""

    path: str
    shape: tuple[int, ...]
    kind: str
    """One of PARAMETER_KINDS."""

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A kind of layer that repeats, with the places where it stands."""

    name: str
    """The class of the layer, and what sets this kind apart from its siblings."""
    stack: str
    """Path of the list that the layers stand in, such as `model.layers`."""
    layers: tuple[int, ...]
    """Positions in that list of the layers of this kind."""
    linears: tuple[Linear, ...]
    parameters: tuple[Parameter, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters of one such layer."""
        return _count(self.linears) + _count(self.parameters)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the layers within the model."""
        return tuple(f"{self.stack}.{layer}" for layer in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a model is made of.

    `total_parameters` counts a tied weight once.

    >>> import memplan
    >>> gpt2 = memplan.inspect("openai-community/gpt2")
    >>> gpt2.num_layers, gpt2.hidden_size, gpt2.total_parameters
    (12, 768, 124439808)
    >>> [linear.path for linear in gpt2.blocks[0].linears]
    ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    """

    name: str
    model_type: str
    """Hugging Face's name of the family."""
    class_name: str
    """The class that transformers (or memplan, for remote code) builds."""
    config: Mapping[str, Any]
    """The configuration as the hub holds it, from which the model can be built."""
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    """Longest sequence that the configuration states."""
    learned_positions: bool
    """Whether positions are an embedding table: then a longer sequence cannot run."""
    generative: bool
    """Whether it is a causal language model, which simulation and estimate need."""
    tied: bool
    """Whether the head's weight is the input embedding's."""
    num_experts: int
    """Experts of a mixture-of-experts layer, 0 where there are none."""
    blocks: tuple[Block, ...]
    linears: tuple[Linear, ...]
    """Linear layers outside of blocks, the head included unless it is tied."""
    parameters: tuple[Parameter, ...]
    """Other parameters outside of blocks, embeddings included."""
    notes: tuple[str, ...] = ()

    @property
    def layers_by_stack(self) -> dict[str, int]:
        """Layers in each stack: vision tower, encoder and decoder have one each."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            counts[block.stack] = counts.get(block.stack, 0) + len(block.layers)
        return counts

    @property
    def main_stack(self) -> str:
        """Path of the stack that holds most parameters: the decoder's layers."""
        sizes: dict[str, int] = {}
        for block in self.blocks:
            size = block.num_parameters * len(block.layers)
            sizes[block.stack] = sizes.get(block.stack, 0) + size
        return max(sizes, key=sizes.__getitem__)

    @property
    def num_layers(self) -> int:
        """Layers in all stacks."""
        return sum(self.layers_by_stack.values())

    @property
    def total_parameters(self) -> int:
        in_blocks = sum(b.num_parameters * len(b.layers) for b in self.blocks)
        return in_blocks + _count(self.linears) + _count(self.parameters)

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers, their biases left out."""
        in_blocks = sum(
            linear.num_weights * len(block.layers)
            for block in self.blocks
            for linear in block.linears
        )
        return in_blocks + sum(linear.num_weights for linear in self.linears)

    @property
    def one_of_each(self) -> Architecture:
        """The model with the first layer alone of each kind."""
        firsts = tuple(
            dataclasses.replace(block, layers=block.layers[:1]) for block in self.blocks
        )
        return dataclasses.replace(self, blocks=firsts)

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Parameters by PARAMETER_KINDS, kinds without any left out."""
        counts = dict.fromkeys(PARAMETER_KINDS, 0)
        for repeats, held in self._held():
            counts[held.kind] += repeats * held.num_parameters
        return {kind: count for kind, count in counts.items() if count}

    def all_linears(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer with its full path, layer after layer, then the rest."""
        for block in self.blocks:
            for path in block.paths:
                for linear in block.linears:
                    yield f"{path}.{linear.path}", linear
        for linear in self.linears:
            yield linear.path, linear

    def to_json(self) -> dict[str, Any]:
        """The architecture as `profiles/architectures` and `--json` hold it."""
        return dataclasses.asdict(self) | {"config": _with_tagged_floats(self.config)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_json` wrote."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        return cls(
            **fields
            | {
                "blocks": tuple(_block(block) for block in data["blocks"]),
                "linears": tuple(Linear(**linear) for linear in data["linears"]),
                "parameters": _parameters(data["parameters"]),
                "notes": tuple(data["notes"]),
            }
        )

    def _held(self) -> Iterator[tuple[int, Linear | Parameter]]:
        for block in self.blocks:
            yield from ((len(block.layers), linear) for linear in block.linears)
            yield from ((len(block.layers), other) for other in block.parameters)
        yield from ((1, linear) for linear in self.linears)
        yield from ((1, other) for other in self.parameters)


def _with_tagged_floats(value: Any) -> Any:
    """The value with infinities and NaN as transformers 5 writes them.

    JSON has no such numbers (configuration_utils.py, `_encode_special_floats`).
    """
    if isinstance(value, Mapping):
        return {key: _with_tagged_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tagged_floats(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": json.dumps(value)}
    return value


def _count(held: tuple[Linear, ...] | tuple[Parameter, ...]) -> int:
    return sum(one.num_parameters for one in held)


def _block(data: Mapping[str, Any]) -> Block:
    return Block(
        name=data["name"],
        stack=data["stack"],
        layers=tuple(data["layers"]),
        linears=tuple(Linear(**linear) for linear in data["linears"]),
        parameters=_parameters(data["parameters"]),
    )


def _parameters(data: list[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(path=one["path"], shape=tuple(one["shape"]), kind=one["kind"])
        for one in data
    )
