"""The catalog's models and cards, and `inspect`: a model's name -> `Architecture`.

A model of the catalog ships inspected; any other is built on the meta device, which
needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError, MissingExtraError
from memplan.gpu import Card, Gpu, cards
from memplan.model_source import ModelSource, catalog_names, read_catalog, read_config


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogModel:
    """A model of the catalog, and what is known of it besides what it is made of."""

    architecture: Architecture
    facts: Mapping[str, Any]
    """Published count, sources and confidence; profiles/README.md has the keys."""

    def to_json(self) -> dict[str, Any]:
        """The model as `memplan models --json` lists it."""
        architecture = self.architecture
        return {
            "name": architecture.name,
            "model_type": architecture.model_type,
            "class_name": architecture.class_name,
            "total_parameters": architecture.total_parameters,
            "num_layers": architecture.num_layers,
            "layers_by_stack": architecture.layers_by_stack,
            "hidden_size": architecture.hidden_size,
            "vocab_size": architecture.vocab_size,
            "max_positions": architecture.max_positions,
            "num_experts": architecture.num_experts,
            "generative": architecture.generative,
            "facts": dict(self.facts),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogCard:
    """A card of the catalog, and the GPU that it is where its total is known."""

    card: Card
    gpu: Gpu | None
    """None for a card without a known total: its size has to be given instead."""

    def matches(self, search: str) -> bool:
        """Whether the card's name or an alias holds the text; case does not matter."""
        names = (self.card["name"], *self.card["aliases"])
        return any(search.casefold() in name.casefold() for name in names)

    def to_json(self) -> dict[str, Any]:
        """The card as `memplan gpus --json` lists it: what is unknown is null."""
        card, gpu = self.card, self.gpu
        return {
            "name": card["name"],
            "aliases": list(card["aliases"]),
            "vendor_class": card["vendor_class"],
            "capacity_bytes": None if gpu is None else gpu.capacity_bytes,
            "context_bytes": None if gpu is None else gpu.context_bytes,
            "compute_capability": card["compute_capability"],
            "memory_bandwidth_gbps": card["mem_bandwidth_gbps"],
            "bf16_dense_tflops": card["bf16_dense_tflops"],
            "native_bf16": card["bf16"] == "native",
            "assumptions": [] if gpu is None else list(gpu.assumptions),
        }


def catalog_models() -> tuple[CatalogModel, ...]:
    """Every model of the catalog, by name; case does not matter."""
    sources = map(read_catalog, sorted(catalog_names(), key=str.casefold))
    return tuple(
        CatalogModel(architecture=architecture_of(source), facts=source.facts)
        for source in sources
    )


def catalog_cards() -> tuple[CatalogCard, ...]:
    """Every card of the catalog on Linux, by file name."""
    return tuple(CatalogCard(card=card, gpu=_gpu(card)) for card in cards())


def inspect(model: str, *, trust_remote_code: bool = False) -> Architecture:
    """What a model is made of.

    `model` is a catalog name, a hub id, a folder or a config.json. Python code that a
    hub repository brings is run only where `trust_remote_code` says so. Raises
    InputError for a model that is unknown or cannot be built.
    """
    source = read_config(model, trust_remote_code=trust_remote_code)
    return architecture_of(source, trust_remote_code=trust_remote_code)


def architecture_of(
    source: ModelSource, *, trust_remote_code: bool = False
) -> Architecture:
    """What the model of a config is made of."""
    if source.architecture is not None:
        identity = {"name": source.name, "config": source.config}
        return Architecture.from_json(source.architecture | identity)
    try:
        from memplan import inspector
    except ModuleNotFoundError as error:
        needed_for = f"inspecting {source.name}, which is not in the catalog"
        raise MissingExtraError(needed_for, error.name or "torch", "torch") from error
    return inspector.inspect(source, trust_remote_code=trust_remote_code)


def _gpu(card: Card) -> Gpu | None:
    try:
        return Gpu.from_card(card)
    except InputError:
        return None
