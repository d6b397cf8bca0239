"""Memory of your own training: a callback for Trainer, and a context for plain loops.

Both read the first steps, moment by moment, keep them as a measured run, and compare
them with the prediction. Where a longer batch is to come that the card cannot hold,
they warn while there is time.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from memplan import accuracy, profiler, registry, runs
from memplan.errors import InputError, MemplanError
from memplan.footprint import Footprint
from memplan.profile import Profile
from memplan.profiler.cpu_meter import CpuMeter
from memplan.profiler.cuda_meter import CudaMeter
from memplan.profiler.environment import card, environment
from memplan.profiler.meter import Meter, Moments
from memplan.profiler.task import WARM_UP_STEPS, Task
from memplan.recipe import Recipe
from memplan.store import RUNS_FOLDER
from memplan.units import format_bytes

SOURCE = "memplan callback"

logger = logging.getLogger("memplan")

_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw-fused",
    "adamw_8bit": "adamw-8bit",
    "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw": "paged-adamw-32bit",
    "paged_adamw_32bit": "paged-adamw-32bit",
    "paged_adamw_8bit": "paged-adamw-8bit",
    "lion_8bit": "lion-8bit",
    "paged_lion_8bit": "paged-lion-8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
}
"""Recipes' names of what TrainingArguments call `optim`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the first steps took beside what was predicted for them."""

    run: Profile
    predicted: Footprint
    errors: Mapping[str, float]
    """By reading: (predicted - measured) / measured."""

    def sentence(self) -> str:
        """The verdict in words."""
        assert self.run.footprint is not None
        measured = self.run.footprint.peak.allocated_bytes
        told = (f"{name} {error:+.2%}" for name, error in self.errors.items())
        return (
            f"The first steps took {format_bytes(measured)}; predicted beside measured:"
            f" {', '.join(told)}"
        )


class Watch:
    """Reads the first steps of a training from within.

    Moments begin where the model's forward begins and ends, and where the optimizer
    steps; a loss that is computed outside of the model, and clipping, count as
    backward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int = WARM_UP_STEPS + 1,
    ) -> None:
        self._model = model
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        self._steps = steps
        self._events: list[Mapping[str, Any]] = []
        self._device = next(model.parameters()).device.type
        self._meter: Meter = CpuMeter() if self._device == "cpu" else CudaMeter()
        self._moments = Moments(self._meter, self)
        self._handles: list[Any] = []
        self._step = 1
        self._is_new = True
        """Whether the step's first forward is still to come."""
        self.shape: tuple[int, int] = (0, 0)
        """Of the largest batch so far: sequences and tokens in each."""

    @property
    def is_done(self) -> bool:
        """Whether as many steps were read as were asked for."""
        return self._step > self._steps

    def write(self, event: str, **values: Any) -> None:
        """Takes an event, as a journal does."""
        self._events.append({"event": event, **values})

    def start(self) -> None:
        """Begins to read."""
        self._meter.__enter__()
        self._moments.hold(self._model)
        if self._device == "cuda":
            self.write("card", **card())
        self.write("environment", values=environment(self._device))
        trained = [p.numel() for p in self._model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in self._model.parameters())
        self.write("parameters", total=total, trainable=sum(trained))
        self._handles = [
            self._model.register_forward_pre_hook(self._forward, with_kwargs=True),
            self._model.register_forward_hook(self._backward),
            self._optimizer.register_step_pre_hook(self._stepping),
            self._optimizer.register_step_post_hook(self._stepped),
        ]

    def stop(self) -> None:
        """Reads what is read once, and takes every hook off again."""
        if not self._handles:
            return
        self._moments.end()
        self.write("finish", **self._meter.finish(self._optimizer))
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._meter.__exit__(None, None, None)
        self.write("outcome", status="ok", message="")

    def profile(self, name: str, config: Mapping[str, Any], recipe: Recipe) -> Profile:
        """The run that was read, under a model's name."""
        task = Task(
            model=name,
            config=config,
            recipe=recipe,
            device=self._device,
            steps=self._steps,
            weights="checkpoint",
        )
        found = profiler.Found.of(self._events)
        place = "cpu" if found.card is None else found.card["name"]
        label = profiler.name_of(task, place, found.environment)
        return profiler.profile_of(task, label, found, SOURCE)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training or self.is_done:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
            batch, length = tokens.shape
            self.shape = max(self.shape, (batch, length), key=_tokens)
        if self._is_new:
            self._is_new = False
            self._moments.begin_step()
        self._moments.begin_phase(self._step, "forward")

    def _backward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and not self.is_done:
            self._moments.begin_phase(self._step, "backward")

    def _stepping(self, *_: Any) -> None:
        if not self.is_done:
            self._moments.begin_phase(self._step, "optimizer")

    def _stepped(self, *_: Any) -> None:
        self._step += 1
        self._is_new = True


@contextlib.contextmanager
def watch(  # noqa: PLR0913 - each says something else of the training
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    name: str = "",
    steps: int = WARM_UP_STEPS + 1,
    out: str | Path | None = RUNS_FOLDER,
) -> Iterator[Watch]:
    """Reads the first steps of the plain loop that runs within.

    `recipe` is what the loop does. When it is over, the run is kept in `out` (None
    keeps nothing), and logged beside its prediction.
    """
    seen = Watch(model, optimizer, steps)
    seen.start()
    try:
        yield seen
    finally:
        seen.stop()
    if seen.is_done:
        _conclude(seen, _named(model, name), _config(model), recipe, out)


class MemplanCallback(transformers.TrainerCallback):
    """Reads the first steps of a Trainer, or an SFTTrainer, and compares them.

    The recipe is read off the trainer's arguments and the model unless it is given.
    `verdict` holds the outcome once the steps are over; it is logged, too.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        name: str = "",
        steps: int = WARM_UP_STEPS + 1,
        out: str | Path | None = RUNS_FOLDER,
    ) -> None:
        self._recipe = recipe
        self._name = name
        self._steps = steps
        self._out = out
        self._watch: Watch | None = None
        self._longest = 0
        self.verdict: Verdict | None = None

    def on_train_begin(  # noqa: PLR0913 - what Trainer hands over
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self._longest = longest_row(train_dataloader, args)
        self._watch = Watch(model, optimizer, self._steps)
        self._watch.start()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        seen = self._watch
        if seen is None or not seen.is_done or self.verdict is not None:
            return
        seen.stop()
        self._watch = None
        try:
            recipe = self._recipe or recipe_of(model, args, seen.shape)
        except MemplanError as error:
            logger.warning("memplan cannot compare this training: %s", error)
            return
        name, config = _named(model, self._name), _config(model)
        self.verdict = _conclude(seen, name, config, recipe, self._out)
        if self.verdict is not None:
            warn_of_longest(self.verdict, self._longest)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


def recipe_of(model: Any, args: Any, shape: tuple[int, int]) -> Recipe:
    """What a trainer's arguments, its model and a batch's shape say of the recipe."""
    trainer = "trl" if type(args).__name__ == "SFTConfig" else "transformers"
    quantization = quantization_of(model)
    keys: dict[str, Any] = {
        "trainer": trainer,
        "quantization": quantization,
        "dtype": str(_weights_dtype(model)).removeprefix("torch."),
        "autocast": _autocast(args),
        "optimizer": _OPTIMIZERS.get(
            str(getattr(args.optim, "value", args.optim)), "adamw"
        ),
        "batch_size": shape[0],
        "sequence_length": shape[1],
        "accumulation": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm or None,
        "checkpointing": "full" if _checkpoints(model) else "none",
        "kbit_prepare": quantization != "none" and _has_float32_norms(model),
        **_adapter_keys(model),
    }
    return Recipe(**keys)


def quantization_of(model: Any) -> str:
    """The recipe's name for how a model's linear layers are stored.

    Raises InputError for what memplan has no scheme of.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return "none"
    told = config if isinstance(config, dict) else config.to_dict()
    kind = getattr(told.get("quant_method"), "value", told.get("quant_method"))
    if kind == "quanto":
        return f"quanto-{told['weights']}"
    if kind not in (None, "bitsandbytes"):
        raise InputError(
            "quantization",
            kind,
            "is not known to memplan",
            f"give MemplanCallback a recipe with one of: {', '.join(_schemes())}",
        )
    if told.get("load_in_8bit"):
        return "int8"
    double = "-double" if told.get("bnb_4bit_use_double_quant") else ""
    return f"{told.get('bnb_4bit_quant_type', 'nf4')}{double}"


def _schemes() -> tuple[str, ...]:
    return registry.names("quantizations")


def longest_row(loader: Any, args: Any) -> int:
    """Tokens of the longest row that is to come; 0 where it cannot be told.

    By the rows' own lengths where they are tokenized, else by what the trainer cuts
    them at.
    """
    cut = getattr(args, "max_length", None) or 0
    rows = getattr(loader, "dataset", None)
    columns = getattr(rows, "column_names", None)
    if rows is None or not columns or "input_ids" not in columns:
        return int(cut)
    longest = max((len(tokens) for tokens in rows["input_ids"]), default=0)
    return min(longest, int(cut)) if cut else longest


def warn_of_longest(verdict: Verdict, longest: int) -> str:
    """Logs a warning where a batch as long as the longest row will not fit; its text.

    What is predicted for it is taken by what the first steps took more.
    """
    run = verdict.run
    if run.gpu is None or longest <= run.recipe.sequence_length:
        return ""
    recipe = dataclasses.replace(run.recipe, sequence_length=longest)
    footprint = _predict(dataclasses.replace(run, recipe=recipe))
    if footprint.fits is not False:
        return ""
    text = (
        f"Sequences of {longest} tokens are to come, {run.recipe.sequence_length} is "
        f"the longest so far: such a batch lacks "
        f"{format_bytes(footprint.missing_bytes)} on {run.card}. Cut sequences, make "
        "batches smaller or turn checkpointing on."
    )
    logger.warning(text)
    return text


def _conclude(
    seen: Watch,
    name: str,
    config: Mapping[str, Any],
    recipe: Recipe,
    out: str | Path | None,
) -> Verdict | None:
    """The verdict on what was seen; None where nothing can be predicted for it.

    A training must not end because of what looks on.
    """
    run = seen.profile(name, config, recipe)
    try:
        if out is not None:
            runs.save(run, Path(out))
        predicted = _predict(run)
        errors = accuracy.compare(run, "simulate", lambda _: predicted).errors
    except MemplanError as error:
        logger.warning("memplan cannot compare this training: %s", error)
        return None
    verdict = Verdict(run=run, predicted=predicted, errors=errors)
    logger.info(verdict.sentence())
    return verdict


def _predict(run: Profile) -> Footprint:
    return accuracy.simulated(accuracy.case_of(run), run.environment).footprint


def _adapter_keys(model: Any) -> dict[str, Any]:
    """The recipe's keys that PEFT's configuration says, if there is one."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {"method": "full"}
    config = next(iter(configs.values()))
    method = str(config.peft_type.value).lower()
    if method == "lora":
        method = (
            "dora" if config.use_dora else "rslora" if config.use_rslora else method
        )
    targets = config.target_modules
    return {
        "method": method,
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "dropout": float(config.lora_dropout),
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
        "trained_modules": tuple(config.modules_to_save or ()),
        "adapter_dtype": str(_trained_dtype(model)).removeprefix("torch."),
    }


def _autocast(args: Any) -> str:
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else "none"


def _checkpoints(model: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _weights_dtype(model: nn.Module) -> torch.dtype:
    """Of the frozen weights' precision, which is that of the model as it was loaded."""
    told: Any = getattr(model.config, "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


def _trained_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.requires_grad)


def _has_float32_norms(model: nn.Module) -> bool:
    """Whether k-bit preparation ran: it makes what is not quantised single."""
    frozen = [p for n, p in model.named_parameters() if "norm" in n and "lora" not in n]
    half = _weights_dtype(model) in (torch.float16, torch.bfloat16)
    return half and bool(frozen) and frozen[0].dtype == torch.float32


def _named(model: Any, name: str) -> str:
    told: str = name or getattr(model.config, "name_or_path", "") or "own model"
    return told


def _config(model: Any) -> dict[str, Any]:
    """The config as a file holds it, without what says how it was quantised."""
    config: dict[str, Any] = model.config.to_diff_dict()
    for key in ("quantization_config", "dtype", "torch_dtype", "transformers_version"):
        config.pop(key, None)
    return {"model_type": model.config.model_type, **config}


def _tokens(shape: Sequence[int]) -> int:
    return shape[0] * shape[1]
