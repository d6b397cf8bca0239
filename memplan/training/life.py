"""A fine-tune beside its steps: evaluated, generating, saved, merged, resumed.

Each is done as a script or its trainer does it, by the same library calls, over meta
tensors, where its allocations are traced, or over real ones.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import InputError
from memplan.generation import GREEDY, STATIC, TOP_P, Generation
from memplan.life import CARD, Evaluation
from memplan.losses.liger import NAME as LIGER
from memplan.recipe import Recipe
from memplan.training.batch import make_batch
from memplan.training.loss import read_loss, run_forward
from memplan.training.step import autocast, silent

Phase = Callable[[str], AbstractContextManager[None]]

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Where models keep what generation hands from one token to the next, in outputs and in
arguments (transformers.generation.utils, ALL_CACHE_NAMES)."""


NUM_LIKELIEST = 50
"""Tokens that `do_sample=True` draws from (GenerationConfig's default)."""

TEMPERATURE = 0.6
LIKELIEST_SHARE = 0.9
"""Those of Llama 3's instruct models (their generation_config.json)."""


def evaluate(
    model: nn.Module, recipe: Recipe, vocab_size: int, evaluation: Evaluation
) -> None:
    """Evaluates on that many batches and leaves the model as it was."""
    Evaluator(model, recipe, vocab_size, evaluation).run()


class Evaluator:
    """An evaluation loop: batch after batch without gradients.

    Trainers join what they keep batch by batch (transformers, Trainer.evaluation_loop
    with `eval_accumulation_steps` None, EvalLoopContainer); a bare loop lists it.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, vocab_size: int, evaluation: Evaluation
    ) -> None:
        self._model = model
        self._recipe = dataclasses.replace(recipe, batch_size=evaluation.batch_size)
        self._vocab_size = vocab_size
        self._evaluation = evaluation
        self._device = next(model.parameters()).device

    def run(self) -> None:
        was_training = self._model.training
        self._model.eval()
        kept: Any = None
        for index in range(self._evaluation.num_batches):
            # The last batch's predictions live on while the next are computed, as the
            # loop variables of Trainer.evaluation_loop do.
            predicted = self.predict(index)
            kept = self._keep(kept, predicted)
        del kept
        self._model.train(was_training)

    def predict(self, index: int) -> list[Tensor]:
        """The loss of a batch, and its logits and labels where they are kept."""
        recipe, model = self._recipe, self._model
        batch = make_batch(recipe, self._vocab_size, self._device)
        with torch.no_grad():
            with autocast(recipe, self._device):
                outputs = run_forward(model, batch | self._flags(), recipe)
            outputs, loss = read_loss(outputs, recipe)
            loss = loss.detach().mean()
            if not self._evaluation.keeps_logits:
                return [loss]
            logits = outputs.get("logits")
            if logits is None:
                outputs = self._forward_to_logits(batch)
                logits = outputs["logits"]
        return [loss, logits.detach(), batch["labels"]]

    def _flags(self) -> dict[str, Any]:
        """What Trainer asks of a model with Liger's loss (Trainer.prediction_step).

        Without it that model computes logits in evaluation. SFTTrainer and a bare loop
        do not ask.
        """
        has_liger = (
            self._recipe.trainer == "transformers" and self._recipe.loss == LIGER
        )
        asks = has_liger and not self._evaluation.keeps_logits
        return {"skip_logits": True} if asks else {}

    def _forward_to_logits(self, batch: dict[str, Tensor]) -> Any:
        """A second forward, where the loss has no logits (SFTTrainer.compute_loss)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with autocast(self._recipe, self._device):
            outputs = self._model(**inputs)
        return _handed_on(outputs, self._recipe)

    def _keep(self, kept: Any, predicted: list[Tensor]) -> Any:
        if self._recipe.trainer == "plain":
            return [*(kept or []), predicted]
        from transformers.trainer_pt_utils import nested_concat

        loss, *others = predicted
        # The loss stands for each of the batch's sequences.
        new = [loss.repeat(self._evaluation.batch_size), *others]
        if kept is None:
            return new
        for index, tensor in enumerate(new):
            kept[index] = nested_concat(kept[index], tensor)
        return kept


def generate(
    model: nn.Module, recipe: Recipe, vocab_size: int, generation: Generation
) -> None:
    """Completes a batch of prompts, and leaves the model as it was."""
    Generator(model, recipe, vocab_size, generation).run()


class Generator:
    """Generation with a cache (transformers, GenerationMixin._sample).

    Models are asked for the logits of the last token alone, where they can be. PEFT
    hands generation to the model below, which accelerate's autocast does not wrap.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, vocab_size: int, generation: Generation
    ) -> None:
        self._owner = model
        self._model = unwrapped(model)
        wrapped = recipe.trainer != "plain" and self._model is model
        self._recipe = dataclasses.replace(
            recipe,
            batch_size=generation.batch_size,
            autocast=recipe.autocast if wrapped else "none",
        )
        self._vocab_size = vocab_size
        self.num_tokens = generation.num_tokens
        self._device = next(model.parameters()).device
        self._tokens: Tensor
        self._mask: Tensor
        self._positions: Tensor
        self._sampling = generation.sampling
        self._is_static = generation.cache == STATIC
        self._processors = _processors(generation.sampling)
        self._logits: Tensor
        """Of the last token; with what is made of them to choose it, they live on while
        the next are computed."""
        self._scores: Tensor
        self._probabilities: Tensor | None = None
        self.caches: dict[str, Any] = {}
        """What goes from one token to the next, by the name of the argument."""

    @torch.no_grad()
    def run(self, phase: Phase = silent) -> None:
        """Reads the prompts, then makes token after token; each a phase."""
        was_training = self._owner.training
        self._owner.eval()
        with phase("prefill"):
            self.read_prompts()
        if self.num_tokens > 1:
            with phase("decode"):
                self.decode_others()
        self.caches = {}
        del self._tokens, self._mask, self._positions, self._logits, self._scores
        self._probabilities = None
        self._owner.train(was_training)

    def decode_others(self) -> None:
        """Makes the tokens after the first."""
        for _ in range(1, self.num_tokens):
            self.decode()

    def read_prompts(self) -> None:
        """Fills the cache, and makes the first token."""
        batch = make_batch(self._recipe, self._vocab_size, self._device)
        self._tokens = batch["input_ids"]
        given = batch.get("attention_mask")
        self._mask = torch.ones_like(self._tokens) if given is None else given
        del batch, given
        positions = self._mask.long().cumsum(-1) - 1
        self._positions = positions.masked_fill(self._mask == 0, 0)
        del positions
        if self._is_static:
            self.caches = {CACHE_NAMES[0]: self._static_cache()}
        self._take(self._forward(self._tokens, self._positions))

    def _static_cache(self) -> Any:
        """Room for all tokens but the last (GenerationMixin.generate)."""
        from transformers import StaticCache

        model: Any = self._model
        length = self._tokens.shape[1] + self.num_tokens - 1
        config = model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=length)

    def decode(self) -> None:
        """Makes one more token."""
        last = self._positions[:, -1:].clone()
        self._take(self._forward(self._tokens[:, -1:], last))

    def _forward(self, tokens: Tensor, positions: Tensor) -> Any:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        known = inspect.signature(self._model.forward).parameters
        with autocast(self._recipe, self._device):
            outputs = self._model(
                input_ids=tokens.clone(),
                attention_mask=self._mask,
                use_cache=True,
                **self.caches,
                **{name: value for name, value in optional.items() if name in known},
            )
        return _handed_on(outputs, self._recipe)

    def _take(self, outputs: Any) -> None:
        self.caches = {
            name: outputs[name]
            for name in CACHE_NAMES
            if name in outputs and outputs[name] is not None
        }
        self._logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        self._scores = self._processors(self._tokens, self._logits)
        self.append(self._choose()[:, None])

    def _choose(self) -> Tensor:
        """The next token of each sequence, (B,)."""
        if self._sampling == GREEDY:
            return torch.argmax(self._scores, dim=-1)
        self._probabilities = nn.functional.softmax(self._scores, dim=-1)
        return torch.multinomial(self._probabilities, num_samples=1).squeeze(1)

    def append(self, tokens: Tensor) -> None:
        """Takes new tokens (B, 1) as made."""
        self._tokens = torch.cat([self._tokens, tokens], dim=-1)
        next_positions = self._positions[:, -1:] + 1
        self._positions = torch.cat([self._positions, next_positions], dim=-1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=-1)


def _processors(sampling: str) -> Any:
    """What makes scores of logits; where there is nothing, these are the scores.

    Models differ in the numbers, which change nothing of what is allocated.
    """
    from transformers import generation

    found = []
    if sampling == TOP_P:
        found.append(generation.TemperatureLogitsWarper(TEMPERATURE))
    if sampling != GREEDY:
        found.append(generation.TopKLogitsWarper(NUM_LIKELIEST))
    if sampling == TOP_P:
        found.append(generation.TopPLogitsWarper(LIKELIEST_SHARE))
    return generation.LogitsProcessorList(found)


def save(model: nn.Module, folder: str) -> None:
    """Saves what was trained: adapters alone, or the whole model."""
    model.save_pretrained(folder)  # type: ignore[operator]


def merge(model: nn.Module) -> nn.Module:
    """The model below the adapters, with these merged into its weights.

    Raises InputError for adapters that PEFT cannot merge, and for weights that it does
    not read whole.
    """
    problems = {getattr(module, "merge_problem", None) for module in model.modules()}
    for problem in problems - {None}:
        raise InputError("--merge", CARD, str(problem), "leave it out")
    try:
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, ValueError) as error:
        problem = f"cannot be done with these adapters ({error})"
        raise InputError("--merge", CARD, problem, "leave it out") from error
    return merged


def load_adapters(model: nn.Module, folder: str) -> None:
    """Takes the adapters that were saved in a folder, as Trainer does when it resumes.

    PEFT reads them onto the card beside those they are copied to, and makes half
    precision single (`load_adapter`). That replaces parameters, so that an optimizer is
    built afterwards (Trainer.train).
    """
    adapted: Any = model
    adapted.load_adapter(folder, adapted.active_adapters[0], is_trainable=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers below PEFT's wrapper; the model itself without one."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def _handed_on(outputs: Any, recipe: Recipe) -> Any:
    """The outputs in float32 where accelerate wraps the model's forward."""
    if recipe.trainer == "plain" or recipe.autocast == "none":
        return outputs
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
