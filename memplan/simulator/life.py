"""Traces the moments of a fine-tune's life that lie outside of its steps."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from memplan import methods, optimizers
from memplan.architecture import Architecture
from memplan.generation import Generation
from memplan.life import CARD, Evaluation, Life
from memplan.recipe import Recipe
from memplan.simulator.events import EventLog
from memplan.simulator.load import STATE
from memplan.simulator.trace import PEFT_PREFIX, Tracer
from memplan.training import life as training_life
from memplan.training.model import trained_parameters
from memplan.training.step import Loop

WHOLE_FORWARDS = 2
"""Batches of an evaluation that are run at its beginning; then the last one is."""

MILESTONE_MICRO_BATCHES = 2
"""The first of a step begins the gradients; every later one is like the second."""

WHOLE_DECODES = 2
"""Tokens at the end of a generation that are run."""

KV_CACHE = "kv_cache"
"""What the tensors of a cache are for."""

GROWING_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""The layers of a cache that hold keys and values alone (transformers.cache_utils)."""

STATIC_LAYERS = ("StaticLayer", "StaticSlidingWindowLayer")
"""Those that have room for all of them, and write in place."""

Phase = Callable[[str], AbstractContextManager[None]]


class LifeTracer:
    """Runs what of a life is asked for, each moment a phase that is announced."""

    def __init__(  # noqa: PLR0913 - each is a part of what is traced
        self,
        model: nn.Module,
        recipe: Recipe,
        architecture: Architecture,
        tracer: Tracer,
        phase: Phase,
        *,
        cpu: bool = False,
    ) -> None:
        """`cpu` says that the model lies on the host itself."""
        self._cpu = cpu
        self._model = model
        self._recipe = recipe
        self._vocab_size = architecture.vocab_size
        self._tracer = tracer
        self._phase = phase
        self.kept: tuple[tuple[int, int], ...] = ()
        """Counts and element sizes of what a batch of the evaluation adds."""

    def before_steps(self, life: Life, make_loop: Callable[[], Loop]) -> Loop:
        """The loop, resumed where the life begins at a checkpoint.

        Whole models are read on the host and copied, which takes nothing of the card,
        and so is the optimizer's state (Trainer._load_from_checkpoint and
        _load_optimizer_and_scheduler).
        """
        if not life.resumes:
            return make_loop()
        with self._phase("resume"):
            if training_life.unwrapped(self._model) is not self._model:
                self.load_adapters()
            loop = make_loop()
            self._load_state(loop)
        return loop

    def reach_milestone(self, loop: Loop, num_steps: int) -> None:
        """What the method does now and then between steps, and one step after it."""
        if methods.find(self._recipe.method).milestone(self._recipe) is None:
            return
        with self._merging():
            loop.reach_milestone()
        self.label_frozen(self._model)
        loop.run_step(
            num_steps + 1, min(self._recipe.accumulation, MILESTONE_MICRO_BATCHES)
        )

    def label_frozen(self, model: nn.Module) -> None:
        """Says of weights that a merge has made anew what they are."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                continue
            self._tracer.label(parameter, "weights")
            for tensor in _tensors_of(getattr(parameter, "quant_state", None)):
                self._tracer.label(tensor, STATE)

    def after_steps(self, life: Life) -> None:
        """Evaluates, generates, saves and merges, while the loop is still held."""
        if life.evaluation is not None:
            with self._phase("evaluate"):
                self._evaluate(life.evaluation)
        if life.generation is not None:
            with self._phase("generate"):
                self._generate(life.generation)
        if life.saves:
            with self._phase("save"), _unwritten(self._model):
                self._save()
        if life.merge == CARD:
            self.merge()

    def merge(self) -> nn.Module:
        """The model with its adapters merged into its weights."""
        with self._phase("merge"), self._merging():
            return training_life.merge(self._model)

    def load_adapters(self) -> None:
        """Reads the adapters of a checkpoint onto the card."""
        with mock.patch("peft.peft_model.load_peft_weights", self._read_adapters):
            training_life.load_adapters(self._model, "")
        for parameter in trained_parameters(self._model):
            self._tracer.label(parameter, "adapters")

    def _load_state(self, loop: Loop) -> None:
        trained = trained_parameters(self._model)
        state = _saved_state(trained, self._recipe, self._tracer)
        loop.optimizer.load_state_dict(state)
        paths = _paths_of_parameters(self._model)
        for parameter, tensors in loop.optimizer.state.items():
            for tensor in tensors.values():
                if isinstance(tensor, Tensor):
                    self._tracer.assign(tensor, paths[id(parameter)])

    def _read_adapters(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The file's tensors on the card, one after another (safetensors load_file)."""
        import peft

        read = {}
        for name, tensor in peft.get_peft_model_state_dict(self._model).items():
            path = name.rpartition(".")[0].removeprefix(PEFT_PREFIX)
            with self._tracer.within(path):
                read[name] = torch.empty_like(tensor)
        return read

    def _evaluate(self, evaluation: Evaluation) -> None:
        arguments = (self._model, self._recipe, self._vocab_size, evaluation)
        evaluator = _FewForwards(*arguments)
        evaluator.run()
        self.kept = tuple(
            (shape.numel(), dtype.itemsize) for shape, dtype in evaluator.shapes
        )

    def _generate(self, generation: Generation) -> None:
        arguments = (self._model, self._recipe, self._vocab_size, generation)
        with numbered(self._model):
            FewTokens(*arguments, tracer=self._tracer).run()

    def _save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            training_life.save(self._model, folder)

    @contextlib.contextmanager
    def _merging(self) -> Iterator[None]:
        """Lets quantised layers merge, and tells allocations by their layer's path."""
        paths = {
            id(module): path.removeprefix(PEFT_PREFIX)
            for path, module in self._model.named_modules()
            if hasattr(module, "base_layer") and hasattr(module, "merge")
        }
        # Layers are released as they are merged, so that they must not be held here.
        kinds: set[Any] = {type(m) for m in self._model.modules() if id(m) in paths}
        quantised = self._recipe.quantization != "none"
        with ExitStack() as stack:
            if quantised:
                stack.enter_context(_quantising(self._tracer, cpu=self._cpu))
            for kind in kinds:
                merge = self._telling(kind.merge, paths)
                stack.enter_context(mock.patch.object(kind, "merge", merge))
            yield

    def _telling(
        self, method: Callable[..., Any], paths: dict[int, str]
    ) -> Callable[..., Any]:
        """A method that tells its object's path, found by the object's identity."""

        @functools.wraps(method)
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self._tracer.within(paths.get(id(module), "")):
                return method(module, *args, **kwargs)

        return run


@contextlib.contextmanager
def numbered(model: nn.Module) -> Iterator[None]:
    """Numbers the layers of a shortened model without gaps, as a cache counts them."""
    numbers: dict[nn.Module, int] = {
        module: module.layer_idx  # type: ignore[misc]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }
    ranks = {number: rank for rank, number in enumerate(sorted({*numbers.values()}))}
    for module, number in numbers.items():
        module.layer_idx = ranks[number]  # type: ignore[assignment]
    yield
    for module, number in numbers.items():
        module.layer_idx = number  # type: ignore[assignment]


class _FewForwards(training_life.Evaluator):
    """An evaluation in which batches amid others are not run: they are all alike."""

    shapes: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    """Of what a batch adds to be kept."""

    def predict(self, index: int) -> list[Tensor]:
        last = self._evaluation.num_batches - 1
        if WHOLE_FORWARDS <= index < last:
            return [
                torch.empty(shape, dtype=dtype, device=self._device)
                for shape, dtype in self.shapes
            ]
        predicted = super().predict(index)
        self.shapes = tuple((tensor.shape, tensor.dtype) for tensor in predicted)
        return predicted


class FewTokens(training_life.Generator):
    """A generation of which the first token and the last two are run.

    In between the cache alone grows: what else a token takes is small, and gone before
    the next.
    """

    def __init__(self, *arguments: Any, tracer: Tracer) -> None:
        super().__init__(*arguments)
        self._tracer = tracer

    def decode_others(self) -> None:
        whole = self.num_tokens - 1
        if all(_grows_alone(cache) for cache in self.caches.values()):
            whole = min(WHOLE_DECODES, whole)
        paths = self._paths_of_layers()
        for _ in range(self.num_tokens - 1 - whole):
            self._grow(paths)
        for _ in range(whole):
            self.decode()

    def _take(self, outputs: Any) -> None:
        super()._take(outputs)
        self._label_caches()

    def _label_caches(self) -> None:
        for cache in self.caches.values():
            for holder in (cache, *getattr(cache, "layers", ())):
                held = getattr(holder, "__dict__", {"": holder})
                for tensor in held_tensors(held.values()):
                    self._tracer.label(tensor, KV_CACHE)

    def _grow(self, paths: dict[int, str]) -> None:
        """One more token, of which the caches alone are told."""
        for cache in self.caches.values():
            for index, layer in enumerate(getattr(cache, "layers", ())):
                if getattr(layer, "keys", None) is not None:
                    with self._tracer.within(paths.get(index, "")):
                        _append(layer)
        self._label_caches()
        batch_size = self._tokens.shape[0]
        self.append(self._tokens.new_empty(batch_size, 1))

    def _paths_of_layers(self) -> dict[int, str]:
        """The modules that the layers of a cache belong to, by their numbers."""
        paths: dict[int, str] = {}
        for path, module in self._model.named_modules():
            number = getattr(module, "layer_idx", None)
            if isinstance(number, int):
                paths.setdefault(number, path)
        return paths


def held_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and those in lists and mappings among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from held_tensors(value)
        elif isinstance(value, dict):
            yield from held_tensors(value.values())


def _grows_alone(cache: Any) -> bool:
    """Whether nothing grows in a cache but keys and values, joined to new ones.

    States of recurrent layers do not grow.
    """
    layers = getattr(cache, "layers", ())
    return all(
        getattr(layer, "keys", None) is None
        or type(layer).__name__ in (*GROWING_LAYERS, *STATIC_LAYERS)
        for layer in layers
    )


def _append(layer: Any) -> None:
    """One more token in a layer of a cache, by the layer's own code."""
    key, value = (
        held.new_empty(*held.shape[:-2], 1, held.shape[-1])
        for held in (layer.keys, layer.values)
    )
    layer.update(key, value)


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """The tensors of a quantised weight's state, and of the state nested in it."""
    if state is not None:
        parts = (state.absmax, state.code, state.offset)
        yield from (part for part in parts if part is not None)
        yield from _tensors_of(state.state2)


def _paths_of_parameters(model: nn.Module) -> dict[int, str]:
    """Paths of the modules that parameters belong to, by the parameters' identities."""
    return {
        id(parameter): name.rpartition(".")[0].removeprefix(PEFT_PREFIX)
        for name, parameter in model.named_parameters()
    }


def _saved_state(
    parameters: list[nn.Parameter], recipe: Recipe, tracer: Tracer
) -> dict[str, Any]:
    """An optimizer's state as a checkpoint holds it, on the host: that after a step."""
    with _disable_current_modes(), Tracer(tracer.gpu, EventLog(), padded=False):
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = optimizers.find(recipe.optimizer).build(parameters)
        optimizer.step()
        saved = optimizer.state_dict()
        for parameter in parameters:
            parameter.grad = None
    with _disable_current_modes():
        saved["state"] = {
            index: {name: _on_host(value) for name, value in tensors.items()}
            for index, tensors in saved["state"].items()
        }
    return saved


def _on_host(value: Any) -> Any:
    """A tensor of the host with the shape of a meta one, that takes no memory there."""
    if not isinstance(value, Tensor) or value.device.type != "meta":
        return value
    return torch.empty((), dtype=value.dtype).expand(value.shape)


@contextlib.contextmanager
def _unwritten(model: nn.Module) -> Iterator[None]:
    """Lets transformers and PEFT save without writing tensors, and without a bar.

    Configs are not written either: that of a shortened model is not valid. PEFT copies
    tensors that share a storage, and would take all meta tensors for one.
    """
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    base: Any = training_life.unwrapped(model)
    with ExitStack() as stack:
        for config in (base.config, base.generation_config):
            if config is not None:
                stack.enter_context(
                    mock.patch.object(type(config), "save_pretrained", _write_nothing)
                )
        for target in ("peft.peft_model", "transformers.modeling_utils"):
            stack.enter_context(mock.patch(f"{target}.safe_save_file", _write_nothing))
        stack.enter_context(
            mock.patch(
                "peft.peft_model.id_tensor_storage",
                lambda tensor: tensor.untyped_storage()._cdata,
            )
        )
        yield
    if was_enabled:
        logging.enable_progress_bar()


def _write_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what writes a file."""


@contextlib.contextmanager
def _quantising(tracer: Tracer, *, cpu: bool) -> Iterator[None]:
    """Lets bitsandbytes quantise meta tensors as what comes from the host to the card.

    PEFT sends merged weights to the host and back, where their arrival on the card
    quantises them (Params4bit.to, Int8Params.to); `_quantize` itself runs as it is. On
    the host (`cpu`) nothing is copied on the way.
    """
    from bitsandbytes import functional
    from bitsandbytes import nn as bnb_nn

    def to_host(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args != ("cpu",):
            return original_to(tensor, *args, **kwargs)
        if cpu:
            return tensor
        with _disable_current_modes():
            copy = torch.empty_like(tensor, device="meta", requires_grad=False)
        tracer.ignore(copy)
        return copy

    def to_card_4bit(weight: Any, device: torch.device) -> Any:
        if not cpu:
            weight.data = torch.empty_like(weight.data)
        return weight._quantize(device)

    def to_card_int8(weight: Any, device: torch.device) -> Any:
        if not cpu:
            weight.data = torch.empty_like(weight.data, dtype=torch.float16)
        return weight._quantize(device)

    original_to = Tensor.to
    with (
        mock.patch.object(Tensor, "to", to_host),
        mock.patch.object(bnb_nn.Params4bit, "to", to_card_4bit),
        mock.patch.object(bnb_nn.Int8Params, "to", to_card_int8),
        mock.patch.dict(functional.name2qmap, _maps(tracer)),
    ):
        yield


def _maps(tracer: Tracer) -> dict[str, Tensor]:
    """The map that quantised absmax values are read by, which the load has left."""
    with _disable_current_modes():
        dynamic = torch.empty(256, dtype=torch.float32, device="meta")
    tracer.ignore(dynamic)
    return {"dynamic": dynamic}
