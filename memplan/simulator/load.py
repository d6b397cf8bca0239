"""The load as `from_pretrained` does it, event by event.

Source: transformers 5.23, `modeling_utils.caching_allocator_warmup` and
`core_model_loading.convert_and_load_state_dict_in_model`,
`integrations.bitsandbytes.Bnb4bitQuantize`; bitsandbytes 0.50,
`functional.quantize_4bit` and `nn.Params4bit._quantize`, `nn.Int8Params._quantize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memplan import quantizations
from memplan.loading import HALF_BYTES, natural_key, warmup_bytes
from memplan.recipe import Recipe
from memplan.simulator.trace import Tracer
from memplan.training.wrapped import plain_tensors

STATE = "quantization_state"
"""The category of what dequantising needs besides the codes."""

STATE_BUFFERS = ("tau_", "group_")
"""Begin the names of buffers of quantised layers: shifts, scales and zero points."""

CODE_SCRATCH_BYTES = 4
"""Two scalars that normalise a 4-bit code (`get_4bit_type`)."""

DYNAMIC_MAP_BYTES = 256 * 4
"""The map of 8-bit values, kept by the process (`functional.name2qmap`)."""


class Loader:
    """Allocates a built model's tensors in the order in which they would arrive.

    `copies` says how many modules of the whole model one of a path stands for.
    """

    def __init__(
        self,
        tracer: Tracer,
        recipe: Recipe,
        copies: Callable[[str], int] = lambda path: 1,
    ) -> None:
        self._tracer = tracer
        self._log = tracer.log
        self._recipe = recipe
        self._copies = copies
        self._loaded: set[int] = set()
        self._has_dynamic_map = False
        self._path = ""
        """The module whose tensors are being loaded."""

    def load(self, model: nn.Module) -> None:
        """Onto the card by `device_map` where quantised, else by way of the host."""
        if self._recipe.quantization == "none":
            for self._path, tensor in _in_module_order(model, ""):
                self._take(tensor)
            return
        self._warm_up(model)
        for name, parameter in sorted(
            _parameters(model), key=lambda named: natural_key(named[0])
        ):
            self._path = name.rpartition(".")[0]
            self._take_parameter(parameter, model.get_submodule(self._path))
        for name, buffer in model.named_buffers():
            self._path, _, end = name.rpartition(".")
            self._take(buffer, STATE if end.startswith(STATE_BUFFERS) else "weights")

    def _warm_up(self, model: nn.Module) -> None:
        """One block for all the weights, so that they are cut from one segment."""
        num_bytes = sum(
            self._copies(name) * parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
        )
        whole = warmup_bytes(num_bytes, self._tracer.gpu.capacity_bytes)
        block = self._allocate(whole // HALF_BYTES * HALF_BYTES)
        self._log.free(block)

    def _take_parameter(self, parameter: Any, module: nn.Module) -> None:
        kind = type(parameter).__name__
        if kind == "Params4bit":
            self._quantize_4bit(parameter, transposed=_is_transposed(module))
        elif kind == "Int8Params":
            self._quantize_int8(parameter)
        elif hasattr(parameter, "__tensor_flatten__"):
            self._quantize_wrapped(parameter, module)
        else:
            self._take(parameter)

    def _quantize_4bit(self, weight: Any, *, transposed: bool) -> None:
        """The 16-bit weight, absmax, codes; the absmax quantised; the weight freed.

        A transposed one is quantised from a copy in rows (Params4bit._quantize).
        """
        state = weight.quant_state
        num_weights = math.prod(state.shape)
        copies = [self._allocate(num_weights * state.dtype.itemsize)]
        if transposed:
            copies.append(self._allocate(num_weights * state.dtype.itemsize))
        nested = state.state2 is not None
        blocks = math.ceil(num_weights / state.blocksize)
        absmax = (
            self._allocate(4 * blocks) if nested else self._take(state.absmax, STATE)
        )
        self._take(weight)
        self._take(state.code, STATE)
        scratch = [self._allocate(CODE_SCRATCH_BYTES) for _ in range(2)]
        for block in scratch:
            self._log.free(block)
        if nested:
            self._quantize_absmax(state, blocks)
            self._log.free(absmax)
        for copy in reversed(copies):
            self._log.free(copy)

    def _quantize_absmax(self, state: Any, blocks: int) -> None:
        self._take(state.offset, STATE)
        difference = self._allocate(4 * blocks)
        if not self._has_dynamic_map:
            self._has_dynamic_map = True
            self._allocate(DYNAMIC_MAP_BYTES, STATE)
        self._take(state.state2.absmax, STATE)
        self._take(state.absmax, STATE)
        self._take(state.state2.code, STATE)
        self._log.free(difference)

    def _quantize_int8(self, weight: Any) -> None:
        """The 16-bit weight, then a second copy that is quantised and dropped."""
        full = self._allocate(HALF_BYTES * weight.numel())
        copy = self._allocate(HALF_BYTES * weight.numel())
        self._take(weight.SCB, STATE)
        self._take(weight)
        self._log.free(copy)
        self._log.free(full)

    def _quantize_wrapped(self, weight: Any, module: nn.Module) -> None:
        """The loaded weight, then what the scheme itself does to quantise it."""
        scheme = quantizations.find(self._recipe.quantization)
        loaded = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        block = self._allocate(weight.numel() * weight.dtype.itemsize)
        self._tracer.ignore(loaded)
        with self._tracer:
            scheme.fill(module, loaded)
        codes, *state = plain_tensors(module.weight)
        self._tracer.label(codes, "weights")
        for tensor in state:
            self._tracer.label(tensor, STATE)
        for tensor in (codes, *state):
            self._tracer.assign(tensor, self._path)
        self._log.free(block)

    def _take(self, tensor: torch.Tensor, category: str = "weights") -> int:
        """Allocates a tensor that stays, once where it is tied."""
        if id(tensor) in self._loaded:
            return -1
        self._loaded.add(id(tensor))
        block = self._allocate(tensor.untyped_storage().nbytes(), category)
        self._tracer.hold(tensor, block)
        return block

    def _allocate(self, num_bytes: int, category: str = "weights") -> int:
        return self._log.allocate(num_bytes, "load", self._path, category)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the checkpoint holds the weight of a quantised layer in columns."""
    return issubclass(module.source_cls, Conv1D)  # type: ignore[arg-type]


def _in_module_order(
    module: nn.Module, path: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, children before their parent (nn.Module._apply)."""
    for name, child in module.named_children():
        yield from _in_module_order(child, f"{path}.{name}".lstrip("."))
    for _, parameter in module.named_parameters(recurse=False):
        yield path, parameter
    for _, buffer in module.named_buffers(recurse=False):
        yield path, buffer


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names."""
    return model.named_parameters(remove_duplicate=False)
