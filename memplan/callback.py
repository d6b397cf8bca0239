"""Memory of your own training: a callback for Trainer, and a context for plain loops.

Both read the first steps, moment by moment, keep them as a measured run, and compare
them with the prediction. Where a longer batch is to come that the card cannot hold,
they warn while there is time.
"""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from memplan import accuracy, methods, profiler, registry, runs
from memplan.errors import InputError, MemplanError
from memplan.footprint import Footprint
from memplan.methods.adalora import SCHEDULE
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

    @property
    def unexplained_bytes(self) -> int:
        """What the first steps took beyond what was predicted; 0 where they did not."""
        assert self.run.footprint is not None
        measured = self.run.footprint.peak.allocated_bytes
        return max(0, measured - self.predicted.peak.allocated_bytes)

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
        then: Callable[[Watch], Verdict | None] = lambda seen: None,
    ) -> None:
        """`then` judges what was read, before the step after the last that is read."""
        self._model = model
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)
        self._steps = steps
        self._then = then
        self._events: list[Mapping[str, Any]] = []
        self._device = _device_of(model)
        self._meter: Meter = CpuMeter() if self._device == "cpu" else CudaMeter()
        self._moments = Moments(self._meter, self)
        self._handles: list[Any] = []
        self._step = 1
        self._is_new = True
        """Whether the step's first forward is still to come."""
        self.shape: tuple[int, int] = (0, 0)
        """Of the largest batch so far: sequences and tokens in each."""
        self.verdict: Verdict | None = None
        """What came of it, once the steps are over; None where nothing could."""

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
        self.leave()
        self.write("outcome", status="ok", message="")

    def leave(self) -> None:
        """Takes every hook off again; what was not read stays unread."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._meter.__exit__(None, None, None)

    def conclude(self) -> None:
        """Stops, and has what was read judged, once, where all steps were read."""
        if not self._handles:
            return
        self.stop()
        if self.is_done:
            self.verdict = self._then(self)

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
        if not module.training:
            return
        if self.is_done:
            self.conclude()
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

    `recipe` is what the loop does, its sequence length the longest that is to come.
    Before the next step begins, or when the loop is over, the run is kept in `out`
    (None keeps nothing) and logged beside its prediction; where the longest batch will
    not fit, that is warned of. `verdict` of what is handed out holds the outcome. A
    loop that fails, or ends before, is kept nowhere.
    """

    def judge(seen: Watch) -> Verdict | None:
        batch_size, length = seen.shape
        read = recipe
        if length:
            read = dataclasses.replace(
                recipe, batch_size=batch_size, sequence_length=length
            )
        verdict = _conclude(seen, _named(model, name), _config(model), read, out)
        if verdict is not None:
            warn_of_longest(verdict, recipe.sequence_length)
        return verdict

    seen = Watch(model, optimizer, steps, judge)
    seen.start()
    try:
        yield seen
    except BaseException:
        seen.leave()
        raise
    seen.conclude()


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
        try:
            self._watch = Watch(model, optimizer, self._steps)
        except InputError as error:
            logger.warning("memplan cannot read this training: %s", error)
            return
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
            self._watch.leave()
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

    What the first steps took more than predicted is taken off the card for it.
    """
    run = verdict.run
    if run.gpu is None or longest <= run.recipe.sequence_length:
        return ""
    recipe = dataclasses.replace(run.recipe, sequence_length=longest)
    left = run.gpu.capacity_bytes - verdict.unexplained_bytes
    gpu = dataclasses.replace(run.gpu, capacity_bytes=left)
    footprint = _predict(dataclasses.replace(run, recipe=recipe, gpu=gpu))
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
        _warn_of_another_recipe(run)
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


def _warn_of_another_recipe(run: Profile) -> None:
    """Logs a warning where the model trains other numbers than the recipe says."""
    recipe = run.recipe
    if recipe.method in ("full", "peft") or recipe.trained_modules:
        return
    meant = methods.trained_in_adapters(accuracy.architecture_of_run(run), recipe)
    trained = run.parameters["trainable"]
    if trained != meant:
        logger.warning(
            "The model trains %d numbers and the recipe %d, so that what is predicted "
            "is of another fine-tune.",
            trained,
            meant,
        )


def _predict(run: Profile) -> Footprint:
    """What is simulated for a run, apart from the loop that is under way.

    What that has switched on for its thread (autocast, no gradients, modes that see
    operators) does not reach another one.
    """

    def simulate() -> Footprint:
        return accuracy.simulated(accuracy.case_of(run), run.environment).footprint

    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        return apart.submit(simulate).result()


def _device_of(model: nn.Module) -> str:
    """`cpu` or `cuda`; raises InputError for a card that is not the first."""
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index:
        raise InputError(
            "model",
            str(device),
            "is not read: memplan reads the first card that CUDA sees",
            f"set CUDA_VISIBLE_DEVICES={device.index} before torch is imported",
        )
    return device.type


def _adapter_keys(model: Any) -> dict[str, Any]:
    """The recipe's keys that PEFT's configuration says, if there is one."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {"method": "full"}
    config = next(iter(configs.values()))
    told = _TOLD.get(type(config).__name__)
    if told is None:
        raise InputError(
            "method",
            type(config).__name__,
            "has no method that can be read off the model",
            "give MemplanCallback a recipe",
        )
    targets = config.target_modules
    return {
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "trained_modules": tuple(config.modules_to_save or ()),
        "adapter_dtype": str(_trained_dtype(model)).removeprefix("torch."),
        **told(config),
    }


def _of_lora(config: Any) -> dict[str, Any]:
    method = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    return {
        "method": method,
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "dropout": float(config.lora_dropout),
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
    }


def _of_adalora(config: Any) -> dict[str, Any]:
    schedule = {key: getattr(config, key) for key in SCHEDULE}
    return {
        "method": "adalora",
        "rank": config.init_r,
        "alpha": float(config.lora_alpha),
        "dropout": float(config.lora_dropout),
        "method_options": {"target_rank": config.target_r, **schedule},
    }


def _of_vera(config: Any) -> dict[str, Any]:
    return {
        "method": "vera",
        "rank": config.r,
        "dropout": float(config.vera_dropout),
        "method_options": {"d_initial": config.d_initial},
    }


_TOLD: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "LoraConfig": _of_lora,
    "AdaLoraConfig": _of_adalora,
    "VeraConfig": _of_vera,
}
"""What PEFT's configurations say, by their classes; memplan's own name no method."""


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
