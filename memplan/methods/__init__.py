"""Fine-tuning methods, one file each: what is trained, and how it is installed.

Shapes: a linear layer maps `in_features` (i) to `out_features` (o); r is the rank, T
the tokens, a the bytes of an adapter's number, c those of the layer's input.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from memplan import registry
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError, UnknownNameError
from memplan.fields import Kind

if TYPE_CHECKING:
    import torch
    from torch import nn

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


NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})

MASK_BYTES = 1
"""A number of a dropout mask on CUDA (aten/src/ATen/native/cuda/Dropout.cu)."""

SINGLE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """What passes through an adapted layer: how many tokens, in which precisions."""

    tokens: int
    input_bytes: int
    """Of a number of the layer's input and output, c."""
    adapter_bytes: int
    """Of a number of the adapter, a."""
    dropout: float = 0.0

    @property
    def casts(self) -> bool:
        """Whether the adapter casts its input, and so has a copy of its own."""
        return self.input_bytes != self.adapter_bytes

    def dropped_bytes(self, width: int) -> int:
        """What dropout keeps of so many features: its mask and its result."""
        if not self.dropout:
            return 0
        return self.tokens * width * (MASK_BYTES + self.adapter_bytes)

    def read_bytes(self, width: int) -> int:
        """What a matrix product keeps of the layer's input, which it may drop first.

        The input itself is kept by others that read it, and costs nothing.
        """
        own = self.tokens * width * self.adapter_bytes if self.casts else 0
        return self.dropped_bytes(width) or own


class Method(ABC):
    """A way to fine-tune: which parameters are trained and how they are installed.

    What is asked of single layers takes the layer, its rank and the method's options
    as they are for that layer (`options_at`); without options the defaults hold.
    """

    summary: ClassVar[str]
    """One line for lists of methods."""
    uses: ClassVar[frozenset[str]]
    """The adapter keys of a recipe that the method reads."""
    options: ClassVar[Mapping[str, Kind]]
    """The method's own options."""
    carries_quantized: ClassVar[bool]
    """Whether the frozen weights below it may be quantised."""
    keeps_base: ClassVar[bool] = True
    """Whether frozen weights stay what they were, so that adapters are all to save."""
    by_lora: ClassVar[bool] = False
    """Whether PEFT installs it as LoRA or a variant of it."""
    defaults: ClassVar[Mapping[str, Any]] = NO_OPTIONS
    """What options are where they are not given."""
    patterned_option: ClassVar[str | None] = None
    """The option that a recipe's `lambda_pattern` sets layer by layer."""
    optimizer_bytes_per_number: ClassVar[int] = 0
    """Bytes that the method itself keeps for a trained number beside the optimizer."""

    def reads(self, recipe: Recipe) -> frozenset[str]:
        """The adapter keys that it reads, with the options of a recipe."""
        return self.uses

    @abstractmethod
    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of the trained tensors of one adapted linear layer."""

    def trainable_parameters(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> int:
        """Trained parameters of one adapted linear layer."""
        shapes = self.parameter_shapes(linear, rank, options)
        return sum(math.prod(shape) for shape in shapes)

    def frozen_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of tensors in the adapter's precision that it adds untrained."""
        return ()

    def shared_shapes(
        self, linears: Iterable[Linear], rank: int
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of float32 tensors that all adapted layers of a model share."""
        return ()

    def saved_bytes(
        self,
        linear: Linear,
        rank: int,
        flow: Flow,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> int | None:
        """New bytes that an adapted layer holds until its backward.

        They come on top of the frozen layer's own. None where no formula is known.
        """
        return None

    def check_linear(  # noqa: B027 - most methods suit any layer
        self,
        path: str,
        linear: Linear,
        rank: int,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        """Raises InputError where a layer's shape or rank does not suit the method."""

    def check_options(self, recipe: Recipe) -> None:
        """Raises InputError for options that the method does not have or cannot use."""
        for key, value in recipe.method_options.items():
            if key not in self.options:
                raise UnknownNameError(
                    "method_options",
                    key,
                    self.options,
                    _options_of(recipe.method, self),
                )
            self.options[key].check(f"method_options.{key}", value)

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """Sentences on what a recipe with this method may not be thought to do."""
        return ()

    def adapted(
        self, linears: Iterable[tuple[str, Linear]], hidden_size: int
    ) -> list[tuple[str, Linear]]:
        """Which of the targeted layers, each with its path, the method adapts."""
        return list(linears)

    @abstractmethod
    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        """The model with the method installed on the linear layers of those paths."""

    def load(self, model: nn.Module, folder: str) -> nn.Module:
        """The model with adapters that `save_pretrained` wrote into a folder."""
        import peft

        loaded: nn.Module = peft.PeftModel.from_pretrained(model, folder)
        return loaded

    def arrange(  # noqa: B027 - most methods leave them in one group
        self, optimizer: torch.optim.Optimizer, model: nn.Module, recipe: Recipe
    ) -> None:
        """Puts an optimizer's parameters into the groups that the method asks for."""

    def after_step(  # noqa: B027 - most methods do nothing
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """What the method does after an optimizer's step, while gradients are there."""

    def milestone(self, recipe: Recipe) -> str | None:
        """What is done now and then between steps, as the label of a moment."""
        return None

    def reach_milestone(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer
    ) -> None:
        """Does what `milestone` says."""
        raise NotImplementedError("nothing is done between steps")


def options_at(recipe: Recipe, path: str) -> Mapping[str, Any]:
    """The options of a recipe's method, defaults included, for the layer of a path."""
    method = find(recipe.method)
    options = {**method.defaults, **recipe.method_options}
    if method.patterned_option is not None:
        by_layer = matching(recipe.lambda_pattern, path)
        if by_layer is not None:
            options[method.patterned_option] = by_layer
    return options


def rank_at(recipe: Recipe, path: str) -> int:
    """The rank of the layer of a path, by the pattern where the method reads it."""
    if "rank_pattern" not in find(recipe.method).reads(recipe):
        return recipe.rank
    rank: int | None = matching(recipe.rank_pattern, path)
    return recipe.rank if rank is None else rank


def alpha_at(recipe: Recipe, path: str) -> float:
    """The alpha of the layer of a path."""
    alpha: float | None = matching(recipe.alpha_pattern, path)
    return recipe.alpha if alpha is None else alpha


def matching(pattern: Mapping[str, Any], path: str) -> Any:
    """What the first key that matches a path's end stands for; None where none does.

    As peft.utils.other.get_pattern_key reads PEFT's patterns.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return None


def adapted_linears(
    architecture: Architecture, recipe: Recipe
) -> list[tuple[str, Linear]]:
    """The layers that a recipe's method adapts, with their paths within the model."""
    targeted = (
        (path, linear)
        for path, linear in architecture.all_linears()
        if _is_targeted(path, linear, recipe)
    )
    return find(recipe.method).adapted(targeted, architecture.hidden_size)


def trained_in_adapters(architecture: Architecture, recipe: Recipe) -> int:
    """Numbers that a recipe's method trains in the layers that it adapts."""
    method = find(recipe.method)
    return sum(
        method.trainable_parameters(
            linear, rank_at(recipe, path), options_at(recipe, path)
        )
        for path, linear in adapted_linears(architecture, recipe)
    )


def check_shapes(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError where a layer's shape or rank does not suit the method."""
    method = find(recipe.method)
    if type(method).check_linear is Method.check_linear:
        return
    differ = bool(recipe.rank_pattern or recipe.lambda_pattern)
    seen: set[int] = set()
    for path, linear in adapted_linears(architecture, recipe):
        if differ or id(linear) not in seen:
            seen.add(id(linear))
            method.check_linear(
                path, linear, rank_at(recipe, path), options_at(recipe, path)
            )


def check_divides(field: str, divisor: int, path: str, **sides: int) -> None:
    """Raises InputError where a number does not divide the sides of a layer."""
    for side, length in sides.items():
        if length % divisor:
            raise InputError(
                field,
                divisor,
                f"does not divide the {length} {side.replace('_', ' ')} of {path}",
                "give a divisor, or leave the layer out of targets",
            )


def _is_targeted(path: str, linear: Linear, recipe: Recipe) -> bool:
    if recipe.targets == "all-linear":
        return linear.kind != "head"
    if isinstance(recipe.targets, str):
        return linear.kind == recipe.targets
    return any(f".{path}".endswith(f".{name}") for name in recipe.targets)


def find(name: str) -> Method:
    """The method of that name; raises UnknownNameError."""
    method: Method = registry.load("methods", name, "method")
    return method


def check(recipe: Recipe) -> tuple[str, ...]:
    """Notes on the recipe's method; raises InputError where it cannot run as asked."""
    method = find(recipe.method)
    method.check_options(recipe)
    if recipe.quantization != "none" and not method.carries_quantized:
        raise InputError(
            "quantization",
            recipe.quantization,
            f"cannot be used with method {recipe.method!r}, which trains the weights",
            "use quantization none, or an adapter method such as lora",
        )
    return (*method.notes(recipe), *_unused_keys(recipe, method))


def _options_of(name: str, method: Method) -> str:
    if not method.options:
        return f"{name} has no options of its own"
    return f"{name} has: {', '.join(method.options)}"


def _unused_keys(recipe: Recipe, method: Method) -> list[str]:
    """A note for each key that is not as it would be by itself and is not read."""
    name = recipe.method_options.get("peft_type", recipe.method)
    named = _untouched(recipe.trainer, recipe.quantization, recipe.rank)
    return [
        f"Method {name} does not use {key}."
        for key in sorted(named.keys() - method.reads(recipe))
        if getattr(recipe, key) != named[key]
    ]


@functools.lru_cache(maxsize=256)
def _untouched(trainer: str, quantization: str, rank: int) -> Mapping[str, Any]:
    """The adapter keys as they are where nobody says anything about them."""
    from memplan.recipe import Recipe

    untouched = Recipe(trainer=trainer, quantization=quantization, rank=rank)
    keys = ADAPTER_KEYS | {"lambda_pattern"}
    return {key: getattr(untouched, key) for key in keys} | {"rank": Recipe().rank}
