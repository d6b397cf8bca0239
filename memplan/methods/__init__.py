"""Fine-tuning methods, one file each: what is trained, and how it is installed.

Shapes: a linear layer maps `in_features` (i) to `out_features` (o); r is the rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from memplan import registry
from memplan.errors import InputError, UnknownNameError
from memplan.fields import Kind

if TYPE_CHECKING:
    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe

ADAPTER_KEYS = frozenset(
    {
        "rank",
        "alpha",
        "dropout",
        "targets",
        "rank_pattern",
        "alpha_pattern",
        "trained_modules",
        "adapter_dtype",
        "input_casts",
    }
)
"""The recipe's keys that describe adapters."""


class Method(ABC):
    """A way to fine-tune: which parameters are trained and how they are installed."""

    summary: ClassVar[str]
    """One line for lists of methods."""
    uses: ClassVar[frozenset[str]]
    """The adapter keys of a recipe that the method reads."""
    options: ClassVar[Mapping[str, Kind]]
    """The method's own options."""
    carries_quantized: ClassVar[bool]
    """Whether the frozen weights below it may be quantised."""

    @abstractmethod
    def trainable_parameters(self, linear: Linear, rank: int) -> int:
        """Trained parameters of one adapted linear layer."""

    @abstractmethod
    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        """The model with the method installed on the linear layers of those paths."""


def find(name: str) -> Method:
    """The method of that name; raises UnknownNameError."""
    method: Method = registry.load("methods", name, "method")
    return method


def check(recipe: Recipe) -> tuple[str, ...]:
    """Notes on the recipe's method; raises InputError where it cannot run as asked."""
    method = find(recipe.method)
    for key, value in recipe.method_options.items():
        if key not in method.options:
            raise UnknownNameError(
                "method_options",
                key,
                method.options,
                _options_of(recipe.method, method),
            )
        method.options[key].check(f"method_options.{key}", value)
    if recipe.quantization != "none" and not method.carries_quantized:
        raise InputError(
            "quantization",
            recipe.quantization,
            f"cannot be used with method {recipe.method!r}, which trains the weights",
            "use quantization none, or an adapter method such as lora",
        )
    return tuple(_unused_keys(recipe, method))


def _options_of(name: str, method: Method) -> str:
    if not method.options:
        return f"{name} has no options of its own"
    return f"{name} has: {', '.join(method.options)}"


def _unused_keys(recipe: Recipe, method: Method) -> list[str]:
    """A note for each key that is not as it would be by itself and is not read."""
    untouched = type(recipe)(
        trainer=recipe.trainer, quantization=recipe.quantization, rank=recipe.rank
    )
    named = {key: getattr(untouched, key) for key in ADAPTER_KEYS | {"lambda_pattern"}}
    named["rank"] = type(recipe)().rank
    return [
        f"Method {recipe.method} does not use {key}."
        for key in sorted(named.keys() - method.uses)
        if getattr(recipe, key) != named[key]
    ]
