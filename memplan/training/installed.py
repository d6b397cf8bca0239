"""Adapters as PEFT really installs them on the meta device, and fresh ones on disk."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from memplan.architecture import Architecture
from memplan.recipe import Recipe
from memplan.training import model as training_model

_PREFIX = "base_model.model."
_SET_BY_PEFT = ("peft_type", "base_model_name_or_path")
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """What an adapter is made of, by the paths of the modules that carry it."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    """What B A x is multiplied with."""
    trainable: int
    """Parameters that are trained."""


def of_recipe(architecture: Architecture, recipe: Recipe) -> Installed:
    """What memplan itself installs for a recipe."""
    with _quiet():
        model = training_model.build(architecture, recipe)
        return _installed(training_model.adapt(model, architecture, recipe))


def of_config(
    architecture: Architecture, recipe: Recipe, config: Mapping[str, Any]
) -> Installed:
    """What PEFT installs for the keys of an adapter_config.json."""
    with _quiet():
        model: Any = training_model.build(architecture, recipe)
        return _installed(peft.get_peft_model(model, _config(config)))


def unmatched_keys(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Keys of the patterns that match no adapted module (`get_pattern_key`)."""
    held = list(paths)
    return [
        key
        for pattern in _PATTERNS
        for key in config[pattern]
        if not any(re.match(rf"(.*\.)?({key})$", path) for path in held)
    ]


def peft_version() -> str:
    """The version of PEFT that is installed."""
    return metadata.version("peft")


def write_fresh_adapter(
    architecture: Architecture,
    recipe: Recipe,
    config: Mapping[str, Any],
    folder: Path,
) -> None:
    """An adapter as PEFT starts it, on disk: A as its Linear, B zero, in float32.

    Source: peft.tuners.lora.layer, `reset_lora_parameters`.
    """
    dense = Recipe.from_mapping(recipe.to_json() | {"quantization": "none"})
    with _quiet():
        model: Any = training_model.build(architecture, dense)
        adapted = peft.get_peft_model(model, _config(config))
    generator = torch.Generator().manual_seed(0)
    state = dict(_fresh(adapted, generator))
    folder.mkdir(parents=True, exist_ok=True)
    _save(state, folder / "adapter_model.safetensors")
    text = json.dumps(dict(config), indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _config(config: Mapping[str, Any]) -> peft.LoraConfig:
    passed = {key: config[key] for key in config if key not in _SET_BY_PEFT}
    return peft.LoraConfig(**passed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings: what they warn of is checked."""
    with warnings.catch_warnings(action="ignore"):
        yield


def _installed(model: nn.Module) -> Installed:
    layers = dict(_lora_layers(model))
    return Installed(
        ranks={path: layer.r["default"] for path, layer in layers.items()},
        scales={path: layer.scaling["default"] for path, layer in layers.items()},
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.r:
            yield path.removeprefix(_PREFIX), module


def _fresh(model: Any, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors with their first values, under the names PEFT saves."""
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        values = torch.zeros(tensor.shape, dtype=torch.float32)
        if "lora_A" in name:
            bound = 1 / math.sqrt(tensor.shape[1])
            values.uniform_(-bound, bound, generator=generator)
        yield name, values


def _save(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
