"""`what_fits`: models by ways to fine-tune them on one card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memplan import estimator, methods, quantizations
from memplan.architecture import Architecture
from memplan.errors import InputError, MissingExtraError
from memplan.estimator import Estimate
from memplan.estimator.limits import longest_sequence
from memplan.estimator.weights import DTYPE_BYTES
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.recipe import Recipe

DEFAULTS: Mapping[str, Any] = {"checkpointing": "full", "sequence_length": 1024}
"""What recipes are here where nothing else is said: 1024 tokens is the max_length of
TRL's SFTConfig, which also turns gradient checkpointing on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to fine-tune: what is trained, and how the frozen weights are stored."""

    method: str
    quantization: str

    @property
    def name(self) -> str:
        """What people call it."""
        known = _NAMES.get((self.method, self.quantization))
        if known is not None:
            return known
        on = "" if self.quantization == "none" else f" on {self.quantization}"
        return f"{self.method}{on}"


_NAMES = {
    ("full", "none"): "full fine-tuning",
    ("lora", "none"): "LoRA",
    ("lora", "int8"): "LoRA on int8",
    ("lora", "nf4-double"): "QLoRA (nf4-double)",
}

USUAL_METHODS = ("full", "lora")
USUAL_QUANTIZATIONS = ("none", "int8", "nf4-double")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Whether a model fits in one way.

    There is no footprint where the way cannot run for the model, or where its weights
    alone are larger than the card.
    """

    architecture: Architecture
    way: Way
    recipe: Recipe
    footprint: Footprint | None = None
    estimate: Estimate | None = None
    """Where the footprint is from."""
    weights_bytes: int = 0
    """What the stored weights take at the least."""
    problem: str = ""
    """Why the way cannot run for the model."""

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is fits."""
        return self.footprint is not None and bool(self.footprint.fits)

    @property
    def longest_sequence(self) -> int | None:
        """The longest that fits at the batch; None where none does.

        It is looked for when it is asked for.
        """
        if self.estimate is None:
            return None
        return longest_sequence(self.estimate, self.estimate.parts.gpu)

    @property
    def device_bytes(self) -> int | None:
        """What nvidia-smi would say at the life's peak."""
        footprint = self.footprint
        if footprint is None:
            return None
        return footprint.device_bytes(footprint.life_peak)

    @property
    def margin_bytes(self) -> int | None:
        """What the card has left; negative where it lacks."""
        return None if self.footprint is None else self.footprint.margin_bytes

    def to_json(self) -> dict[str, Any]:
        """The answer as output shows it."""
        footprint = self.footprint
        return {
            "model": self.architecture.name,
            "model_type": self.architecture.model_type,
            "total_parameters": self.architecture.total_parameters,
            "method": self.way.method,
            "quantization": self.way.quantization,
            "batch_size": self.recipe.batch_size,
            "sequence_length": self.recipe.sequence_length,
            "fits": self.fits,
            "peak": footprint and footprint.peak_json(footprint.peak),
            "life_peak": footprint and footprint.peak_json(footprint.life_peak),
            "margin_bytes": self.margin_bytes,
            "longest_sequence_length": self.longest_sequence,
            "weights_bytes": self.weights_bytes,
            "problem": self.problem or None,
        }


def ways(
    asked_methods: Sequence[str] = (), asked_quantizations: Sequence[str] = ()
) -> tuple[Way, ...]:
    """Every way that the names give, the usual ones where none are given.

    A scheme that was asked for leaves out, of the usual methods, those that cannot
    carry it; raises InputError where nothing is left, UnknownNameError for a name.
    """
    for name in asked_quantizations:
        quantizations.find(name)
    found = tuple(
        Way(method=method, quantization=quantization)
        for method in asked_methods or USUAL_METHODS
        for quantization in asked_quantizations or USUAL_QUANTIZATIONS
        if quantization == "none" or methods.find(method).carries_quantized
    )
    if not found:
        raise InputError(
            "quantization",
            ", ".join(asked_quantizations),
            f"cannot be used with method {', '.join(asked_methods)}",
            "use quantization none, or an adapter method such as lora",
        )
    return found


def what_fits(
    architectures: Sequence[Architecture],
    asked: Sequence[Way],
    keys: Mapping[str, Any],
    gpu: Gpu,
    *,
    thorough: bool,
) -> Iterator[Answer]:
    """An answer for each model and way; `keys` are the recipe's besides these.

    Models whose weights alone are too large are estimated only where `thorough`; only
    then is what torch is missing for an error. Raises InputError for recipe keys that
    no model could be trained with.
    """
    recipes = [
        Recipe.from_mapping(
            {
                **DEFAULTS,
                **keys,
                "method": way.method,
                "quantization": way.quantization,
            }
        )
        for way in asked
    ]
    for architecture in architectures:
        for way, recipe in zip(asked, recipes, strict=True):
            shaped = _within_positions(architecture, recipe)
            yield _answer(architecture, way, shaped, gpu, thorough=thorough)


def ranked(answers: Sequence[Answer], asked: Sequence[Way]) -> list[Answer]:
    """The answers way by way: what fits first, the largest model at the top.

    What does not fit comes after it, the smallest model first.
    """

    def place(answer: Answer) -> tuple[int, bool, int, str]:
        size = answer.architecture.total_parameters
        return (
            asked.index(answer.way),
            not answer.fits,
            -size if answer.fits else size,
            answer.architecture.name.casefold(),
        )

    return sorted(answers, key=place)


def least_weights_bytes(architecture: Architecture, recipe: Recipe) -> int:
    """Fewer bytes than the weights can take: what is quantised without its state."""
    bits = quantizations.find(recipe.quantization).bits
    item = DTYPE_BYTES[recipe.dtype]
    if bits is None:
        return architecture.total_parameters * item
    linear = architecture.linear_weights
    return linear * bits // 8 + (architecture.total_parameters - linear) * item


def _within_positions(architecture: Architecture, recipe: Recipe) -> Recipe:
    """The recipe, its sequences cut to the positions that a model has learned."""
    longest = architecture.max_positions
    if not architecture.learned_positions or longest is None:
        return recipe
    if recipe.sequence_length <= longest:
        return recipe
    return dataclasses.replace(recipe, sequence_length=longest)


def _answer(
    architecture: Architecture, way: Way, recipe: Recipe, gpu: Gpu, *, thorough: bool
) -> Answer:
    weights_bytes = least_weights_bytes(architecture, recipe)
    known = Answer(
        architecture=architecture, way=way, recipe=recipe, weights_bytes=weights_bytes
    )
    if weights_bytes > gpu.budget_bytes and not thorough:
        return known
    try:
        estimate = estimator.run(architecture, recipe, gpu)
        if estimate.parts.tape.window is not None:
            # Beyond the window another tape is needed, which may be missing.
            longest_sequence(estimate, gpu)
    except InputError as error:
        if thorough and isinstance(error, MissingExtraError):
            raise
        return dataclasses.replace(known, problem=str(error))
    return dataclasses.replace(known, footprint=estimate.footprint, estimate=estimate)
