"""`Life`: what a fine-tune goes through besides load, adaptation and steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.generation import GENERATED_TOKENS, Generation, room_for_tokens
from memplan.recipe import Recipe

EVALUATION_BATCH = 8
"""Sequences of a batch (TrainingArguments.per_device_eval_batch_size)."""

EVALUATION_BATCHES = 2
"""The fewest after which what an evaluation keeps has been joined once."""

CARD = "card"
HOST = "host"
MERGE_PLACES = (CARD, HOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation after the last step."""

    batch_size: int
    num_batches: int = EVALUATION_BATCHES
    keeps_logits: bool = True
    """Whether logits and labels stay on the card until it is over, besides losses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """Which moments come before and after the steps."""

    evaluation: Evaluation | None = None
    generation: Generation | None = None
    saves: bool = False
    merge: str | None = None
    """Where adapters are merged, `card` or `host`; None where they are not."""
    resumes: bool = False
    """Whether adapters and the optimizer's state come from a checkpoint."""

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """What these moments take for granted."""
        if self.evaluation is not None and self.evaluation.keeps_logits:
            yield _note_of_evaluation(self.evaluation, recipe)
        if self.merge == CARD and recipe.quantization != "none":
            yield (
                "Merged weights are quantised again, which rounds them; --merge host "
                f"merges into {recipe.dtype}."
            )
        if self.merge == HOST:
            yield (
                f"Adapters are merged into {recipe.dtype} weights by a process of its "
                "own on the host, which takes nothing of the card."
            )
        if self.resumes:
            yield "The run resumes: its first step finds the optimizer's state."
            if recipe.method != "full" and recipe.adapter_dtype != "float32":
                yield "Adapters of a resumed run are float32: PEFT casts what it loads."
            if recipe.optimizer.startswith("paged-"):
                yield (
                    "States that come from a checkpoint are not paged: bitsandbytes "
                    "loads them onto the card."
                )


NO_LIFE = Life()


@dataclass(frozen=True, kw_only=True, slots=True)
class LifeOptions:
    """What of a fine-tune's life is asked for; `whole` asks for all of it."""

    whole: bool = False
    eval_batch: int | None = None
    eval_batches: int | None = None
    prediction_loss_only: bool = False
    generate: int | None = None
    save: bool = False
    merge: str | None = None
    resume: bool = False

    def choose(self, architecture: Architecture, recipe: Recipe) -> Life:
        """The life that is asked for; raises InputError for what cannot be done."""
        has_adapters = recipe.method != "full"
        if self.merge is not None and not has_adapters:
            raise InputError(
                "--merge",
                self.merge,
                "has nothing to merge: method full trains the weights themselves",
                "leave it out",
            )
        plain = recipe.trainer == "plain"
        batch_size = self.eval_batch or (
            recipe.batch_size if plain else EVALUATION_BATCH
        )
        return Life(
            evaluation=self._evaluation(batch_size),
            generation=self._generation(batch_size, architecture, recipe),
            saves=self.save or self.whole,
            merge=self.merge or (CARD if self.whole and has_adapters else None),
            resumes=self.resume or self.whole,
        )

    def _evaluation(self, batch_size: int) -> Evaluation | None:
        asked = self.eval_batch or self.eval_batches or self.prediction_loss_only
        if not asked and not self.whole:
            return None
        return Evaluation(
            batch_size=batch_size,
            num_batches=self.eval_batches or EVALUATION_BATCHES,
            keeps_logits=not self.prediction_loss_only,
        )

    def _generation(
        self, batch_size: int, architecture: Architecture, recipe: Recipe
    ) -> Generation | None:
        """The tokens that are asked for; by default at most what there is room for."""
        room = room_for_tokens(architecture, recipe)
        num_tokens = self.generate
        if num_tokens is None:
            num_tokens = min(GENERATED_TOKENS, room) if self.whole else 0
        elif num_tokens > room:
            raise InputError(
                "--generate",
                num_tokens,
                f"tokens do not fit behind prompts of {recipe.sequence_length}, as "
                f"{architecture.name} has but {architecture.max_positions} positions",
                f"give at most {room}, or a shorter --sequence-length",
            )
        if num_tokens <= 0:
            return None
        return Generation(batch_size=batch_size, num_tokens=num_tokens)


def _note_of_evaluation(evaluation: Evaluation, recipe: Recipe) -> str:
    shape = f"{evaluation.num_batches} batches of {evaluation.batch_size}"
    if recipe.trainer == "plain":
        return (
            f"The evaluation keeps the logits of {shape} on the card, and every batch "
            "more adds to them; --prediction-loss-only keeps none."
        )
    return (
        f"The evaluation keeps the logits of {shape} on the card and joins them, as a "
        "trainer with compute_metrics does, and every batch more adds to them; without "
        "compute_metrics it keeps none: --prediction-loss-only."
    )
