"""The training loops that are measured, each as its users run it.

`plain` is a loop prepared by accelerate; `transformers` and `trl` are the real Trainer
and SFTTrainer, told by their own arguments what the recipe says. All of them are given
the recipe's optimizer, in the groups of its method.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memplan import methods
from memplan.errors import InputError
from memplan.inference import loaded_as
from memplan.profiler.data import batches, collate, rows_of
from memplan.profiler.meter import Moments
from memplan.profiler.task import WARM_UP_STEPS, Task
from memplan.recipe import Recipe, presets
from memplan.training.attention import repeated_heads
from memplan.training.life import Generator
from memplan.training.loss import read_loss, run_forward
from memplan.training.model import trained_parameters
from memplan.training.step import autocast, build_optimizer


def check(recipe: Recipe, device: str) -> None:
    """Raises InputError for keys that the trainer, or the device, cannot do."""
    preset = presets(recipe.trainer, recipe.quantization)
    if recipe.trainer != "plain" and recipe.keep_outputs != preset["keep_outputs"]:
        _refuse(recipe, "keep_outputs", f"{recipe.trainer} drops the output at once")
    if recipe.trainer == "trl" and recipe.loss != "chunked":
        _refuse(recipe, "loss", "SFTTrainer has its fused head and no other loss")
    if recipe.trainer == "transformers" and recipe.loss == "chunked":
        _refuse(recipe, "loss", "Trainer does not ask for TRL's fused head")
    if device == "cpu" and recipe.attention in ("efficient", "cudnn"):
        _refuse(recipe, "attention", "CPUs have no such kernel")
    if device == "cpu" and recipe.autocast == "float16" and recipe.trainer != "plain":
        _refuse(recipe, "autocast", "accelerate scales losses on cards alone")


def _refuse(recipe: Recipe, field: str, reason: str) -> None:
    raise InputError(
        field,
        getattr(recipe, field),
        f"cannot be measured: {reason}",
        "leave the key out, or use trainer plain on a card",
    )


def build_recipe(recipe: Recipe) -> Recipe:
    """The recipe by which the model is built: SFTTrainer puts its head on itself."""
    if recipe.trainer != "trl":
        return recipe
    return dataclasses.replace(recipe, loss="full")


def train(model: nn.Module, task: Task, vocab_size: int, moments: Moments) -> Any:
    """Runs the steps of a task on an adapted model; the optimizer, with its state."""
    with _pinned(task.recipe.attention):
        if task.recipe.trainer == "plain":
            return _PlainLoop(model, task, vocab_size, moments).run()
        return _train_by_trainer(model, task, vocab_size, moments)


def infer(model: nn.Module, task: Task, vocab_size: int, moments: Moments) -> None:
    """Answers a batch of prompts, token after token."""
    assert task.inference is not None

    @contextlib.contextmanager
    def phase(label: str) -> Iterator[None]:
        moments.begin(label)
        yield
        moments.end()

    generation = task.inference.generation(task.recipe)
    recipe = loaded_as(task.recipe)
    with _pinned(recipe.attention):
        Generator(model, recipe, vocab_size, generation).run(phase)


class _PlainLoop:
    """A loop that accelerate prepares, as its users write it."""

    def __init__(
        self, model: nn.Module, task: Task, vocab_size: int, moments: Moments
    ) -> None:
        from accelerate import Accelerator

        self._task = task
        self._recipe = task.recipe
        self._moments = moments
        self._device = _device_of(model)
        self._accelerator = Accelerator(cpu=self._device.type == "cpu")
        self._built = build_optimizer(model, self._recipe)
        # The model is where it belongs, and an optimizer without state need not move.
        self._model, self._optimizer = self._accelerator.prepare(
            model, self._built, device_placement=[False, False]
        )
        self._batches = batches(task, vocab_size, self._device)
        self._course = _Course(self._model, task, self._built, moments)
        self._outputs: Any = None
        """The model's output, for as long as the recipe keeps it."""

    def run(self) -> Any:
        """Runs the task's steps; the optimizer, with its state."""
        for step in itertools.count(1):
            self._moments.begin_step()
            losses = [
                self._run_micro_batch(step) for _ in range(self._recipe.accumulation)
            ]
            self._update(step)
            self._moments.end_step(step, sum(losses))
            if self._course.ends_with(step):
                break
        self._outputs = None
        return self._built

    def _run_micro_batch(self, step: int) -> float:
        recipe = self._recipe
        if recipe.keep_outputs == "backward":
            self._outputs = None
        self._moments.begin_phase(step, "forward")
        batch = next(self._batches)
        with autocast(recipe, self._device):
            outputs = run_forward(self._model, batch, recipe)
        outputs, loss = read_loss(outputs, recipe)
        if recipe.accumulation > 1:
            loss = loss / recipe.accumulation
        self._outputs = None if recipe.keep_outputs == "none" else outputs
        del outputs
        self._moments.begin_phase(step, "backward")
        self._accelerator.backward(loss)
        return loss.item()

    def _update(self, step: int) -> None:
        if self._recipe.max_grad_norm is not None:
            self._moments.begin_phase(step, "clip")
            self._accelerator.clip_grad_norm_(
                trained_parameters(self._model), self._recipe.max_grad_norm
            )
        self._moments.begin_phase(step, "optimizer")
        self._optimizer.step()
        self._course.take_step(step)
        self._optimizer.zero_grad()
        if self._recipe.keep_outputs == "backward":
            self._outputs = None


def _train_by_trainer(
    model: nn.Module, task: Task, vocab_size: int, moments: Moments
) -> Any:
    moments.begin("trainer")
    optimizer = build_optimizer(model, task.recipe)
    made = _trainer(model, task, rows_of(task, vocab_size), optimizer)
    _watch(made, _Course(model, task, optimizer, moments), moments)
    made.train()
    return optimizer


def _trainer(
    model: nn.Module, task: Task, rows: list[Any], optimizer: torch.optim.Optimizer
) -> Any:
    import datasets
    import transformers

    arguments = _arguments(task)
    common = {
        "model": model,
        "train_dataset": datasets.Dataset.from_list(rows),
        "data_collator": collate,
        "optimizers": (optimizer, None),
    }
    if task.recipe.trainer == "transformers":
        made = transformers.Trainer(
            args=transformers.TrainingArguments(**arguments), **common
        )
    else:
        import trl

        made = trl.SFTTrainer(
            args=trl.SFTConfig(
                max_length=task.recipe.sequence_length, packing=False, **arguments
            ),
            processing_class=_tokenizer(),
            **common,
        )
    made._get_train_sampler = _in_order
    return made


def _arguments(task: Task) -> dict[str, Any]:
    """The trainer's own arguments; checkpointing is already on in the model."""
    recipe = task.recipe
    return {
        "output_dir": task.folder,
        "max_steps": task.total_steps,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "max_grad_norm": recipe.max_grad_norm or 0.0,
        "bf16": recipe.autocast == "bfloat16",
        "fp16": recipe.autocast == "float16",
        "gradient_checkpointing": False,
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device != "cpu",
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": task.seed,
    }


def _watch(made: Any, course: _Course, moments: Moments) -> None:
    """Has a trainer announce its phases, by what it calls at their beginnings."""
    step = _Step()

    def announced(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            moments.begin_phase(step.number, phase)
            return function(*args, **kwargs)

        return call

    accelerator = made.accelerator
    backward = announced(accelerator.backward, "backward")

    def noted_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        step.loss += loss.item()

    made.compute_loss = announced(made.compute_loss, "forward")
    accelerator.backward = noted_backward
    accelerator.clip_grad_norm_ = announced(accelerator.clip_grad_norm_, "clip")
    made.optimizer.register_step_pre_hook(
        lambda *_: moments.begin_phase(step.number, "optimizer")
    )
    made.add_callback(_step_callback(step, moments, course))


def _step_callback(step: _Step, moments: Moments, course: _Course) -> Any:
    """What counts a trainer's steps, does what the method adds, and ends the training.

    A method's own part of a step comes before gradients are dropped
    (Trainer._inner_training_loop).
    """
    import transformers

    class Steps(transformers.TrainerCallback):
        """Counts the steps."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step.number = state.global_step + 1
            step.loss = 0.0
            moments.begin_step()

        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, **_: Any
        ) -> None:
            course.take_step(step.number)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moments.end_step(step.number, step.loss)
            control.should_training_stop |= course.ends_with(step.number)

    return Steps()


class _Step:
    """The step that runs, and the sum of its losses."""

    __slots__ = ("loss", "number")

    def __init__(self) -> None:
        self.number = 1
        self.loss = 0.0


class _Course:
    """What comes with steps and between them: the method's part, and the end.

    A method's milestone is reached after the task's steps, and one step follows it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        moments: Moments,
    ) -> None:
        self._model = model
        self._task = task
        self._method = methods.find(task.recipe.method)
        self._optimizer = optimizer
        self._moments = moments
        self._is_last = False
        """Whether the milestone is past, so that the step after it is the last."""

    def take_step(self, step: int) -> None:
        """The method's part of a step, while gradients are there."""
        self._method.after_step(self._model, self._optimizer, step)

    def ends_with(self, step: int) -> bool:
        """Whether a step that is over was the last; reaches the milestone if not."""
        if self._is_last:
            return True
        if step < self._task.steps and not self._is_time_up(step):
            return False
        label = self._task.milestone
        if label is None:
            return True
        self._moments.begin_milestone(label)
        self._method.reach_milestone(self._model, self._task.recipe, self._optimizer)
        self._moments.end()
        self._is_last = True
        return False

    def _is_time_up(self, step: int) -> bool:
        limit = self._task.seconds
        if limit is None or step <= WARM_UP_STEPS:
            return False
        return self._moments.seconds > limit


def _tokenizer() -> Any:
    """The least that SFTTrainer takes: nothing is tokenized by it."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def _in_order(dataset: Any = None) -> Any:
    """The sampler that keeps the rows' order."""
    return torch.utils.data.SequentialSampler(dataset)


@contextlib.contextmanager
def _pinned(attention: str) -> Iterator[None]:
    """Allows the recipe's attention kernel alone, where it names one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    if attention not in backends:
        yield
        return
    with repeated_heads(attention), sdpa_kernel([backends[attention]]):
        yield


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
