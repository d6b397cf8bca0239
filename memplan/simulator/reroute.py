"""Sends functions to the operators that CUDA would run, and casts as autocast would.

Over meta tensors, PyTorch takes other operators than over CUDA tensors for dropout,
attention and half-precision softmax, and autocast casts nothing. What stands in for
these functions works above autograd, so that it has the gradients of what CUDA calls.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from memplan.recipe import Recipe
from memplan.simulator import attention
from memplan.simulator.trace import Tracer
from memplan.training.wrapped import any_wraps

_MATRIX_PRODUCTS = (
    "addmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "einsum",
    "matmul",
    "mm",
    "mv",
    "__matmul__",
    "__rmatmul__",
)

LOWER_PRECISION = {
    F: ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"),
    torch: _MATRIX_PRODUCTS,
    torch.Tensor: _MATRIX_PRODUCTS,
}
"""Functions that autocast runs in its precision (aten/src/ATen/autocast_mode.h,
AT_FORALL_LOWER_PRECISION_FP), by where they are looked up."""

_POINTWISE_FLOAT32 = ("exp", "log", "logsumexp", "pow", "reciprocal", "rsqrt")

FLOAT32 = {
    F: (
        "binary_cross_entropy_with_logits",
        "cosine_similarity",
        "group_norm",
        "kl_div",
        "layer_norm",
        "mse_loss",
        "nll_loss",
        "rms_norm",
        "smooth_l1_loss",
        "softplus",
    ),
    torch: _POINTWISE_FLOAT32,
    torch.Tensor: (*_POINTWISE_FLOAT32, "__pow__", "__rpow__"),
}
"""Functions that autocast runs in float32 (AT_FORALL_FP32)."""

_SUMS = ("cumsum", "log_softmax", "prod", "softmax", "sum")

FLOAT32_BY_DTYPE = {
    F: ("log_softmax", "softmax"),
    torch: _SUMS,
    torch.Tensor: _SUMS,
}
"""Functions that autocast asks for a float32 result (AT_FORALL_FP32_SET_OPT_DTYPE)."""

CPU_FLOAT32 = {
    F: (
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "kl_div",
        "l1_loss",
        "mse_loss",
        "nll_loss",
        "smooth_l1_loss",
    ),
    torch: ("prod",),
    torch.Tensor: ("prod",),
}
"""Functions that autocast runs in float32 on a CPU, where softmax and norms stay in the
precision they are given (autocast_mode.cpp, TORCH_LIBRARY_IMPL(aten, AutocastCPU))."""


class Reroute:
    """Makes functions of meta tensors do what they do with CUDA tensors.

    Functions are replaced where they are looked up, so that a checkpoint's second
    forward, which runs inside of the backward, meets them too.
    """

    def __init__(self, tracer: Tracer, recipe: Recipe, cpu: bool = False) -> None:
        """`cpu` says that functions do what they do with tensors on a CPU."""
        self._cpu = cpu
        self._tracer = tracer
        self._attention = recipe.attention
        self._autocasts = recipe.autocast != "none"
        self._chunks = recipe.loss == "chunked"
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Functions are replaced, and torch.autocast("cuda") switches on without CUDA.

        What that switches is read here, and by the layers of PEFT and bitsandbytes.
        """
        with ExitStack() as stack:
            asked = _AS_ON_CPU if self._cpu else _WITHOUT_CUDA
            for target, replacement in asked.items():
                stack.enter_context(mock.patch(target, replacement))
            for module in _askers(_MAYBE_AUTOCAST):
                stack.enter_context(
                    mock.patch.object(module, _MAYBE_AUTOCAST, _maybe_autocast)
                )
            stack.enter_context(
                mock.patch(
                    "transformers.integrations.moe._can_use_grouped_mm",
                    lambda *args: self._has_grouped_product(),
                )
            )
            stack.enter_context(
                mock.patch(
                    "torch.cuda.get_device_capability",
                    lambda *args: self._tracer.gpu.compute_capability,
                )
            )
            stack.enter_context(
                mock.patch("torch.clear_autocast_cache", self._casts.clear)
            )
            stack.enter_context(
                mock.patch.object(torch.Tensor, "tolist", _listed(torch.Tensor.tolist))
            )
            if self._cpu:
                stack.enter_context(_asking_for_autocast(unnamed=False))
            elif self._chunks:
                stack.enter_context(_triton_like())
            for (owner, name), function in self._replacements().items():
                stack.enter_context(mock.patch.object(owner, name, function))
            yield

    def _has_grouped_product(self) -> bool:
        """CPUs have had it since torch 2.9."""
        capability = self._tracer.gpu.compute_capability
        return self._cpu or capability >= _GROUPED_PRODUCT_CAPABILITY

    def _replacements(self) -> dict[tuple[Any, str], Callable[..., Any]]:
        attend = self._scaled_dot_product_attention
        if self._cpu:
            on_cpu: dict[tuple[Any, str], Callable[..., Any]] = {
                (F, "scaled_dot_product_attention"): attend
            }
            if self._autocasts:
                self._add_autocast(on_cpu, CPU_FLOAT32, {})
            return on_cpu
        replaced: dict[tuple[Any, str], Callable[..., Any]] = {
            (F, "scaled_dot_product_attention"): attend,
            (F, "dropout"): _dropout,
            (torch, "dropout"): _dropout,
            (F, "softmax"): _softmax,
            (F, "log_softmax"): _log_softmax,
        }
        for name, half in (("softmax", "_softmax"), ("log_softmax", "_log_softmax")):
            for owner in (torch, torch.Tensor):
                original = getattr(owner, name)
                replaced[owner, name] = _fused_in_half(original, half)
        if self._autocasts:
            self._add_autocast(replaced, FLOAT32, FLOAT32_BY_DTYPE)
        return replaced

    def _add_autocast(
        self,
        replaced: dict[tuple[Any, str], Callable[..., Any]],
        float32: Mapping[Any, tuple[str, ...]],
        float32_by_dtype: Mapping[Any, tuple[str, ...]],
    ) -> None:
        for listed, cast in (
            (LOWER_PRECISION, self._to_autocast),
            (float32, self._to_float32),
            (float32_by_dtype, _with_float32_result),
        ):
            for owner, names in listed.items():
                for name in names:
                    if not hasattr(owner, name):
                        continue
                    function = replaced.get((owner, name), getattr(owner, name))
                    replaced[owner, name] = _casting(function, cast)

    def _to_autocast(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._cast_all(args, kwargs, torch.get_autocast_dtype("cuda"))

    def _to_float32(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._cast_all(args, kwargs, torch.float32)

    def _cast_all(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        return (
            tuple(self._cast(arg, dtype) for arg in args),
            {name: self._cast(arg, dtype) for name, arg in kwargs.items()},
        )

    def _cast(self, arg: Any, dtype: torch.dtype) -> Any:
        """The argument in autocast's precision; casts of trained weights are kept.

        Source: aten/src/ATen/autocast_mode.cpp, `cached_cast`.
        """
        if isinstance(arg, list | tuple):
            return type(arg)(self._cast(item, dtype) for item in arg)
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            return arg
        if arg.dtype == dtype or arg.dtype == torch.float64:
            return arg
        lowered = dtype != torch.float32 and arg.dtype == torch.float32
        if not (lowered and arg.requires_grad and arg.is_leaf and not arg._is_view()):
            return arg.to(dtype)
        if id(arg) not in self._casts:
            self._casts[id(arg)] = (arg, arg.to(dtype))
        return self._casts[id(arg)][1]

    def _scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention by the kernel that the card, or the CPU, would take."""
        inputs = attention.Inputs(query, key, value, attn_mask, *args, **kwargs)
        if self._cpu:
            return attention.attend_on_cpu(inputs, self._attention, self._tracer)
        return attention.attend(inputs, self._attention, self._tracer)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """torch.autocast, for the card where the tensors asked are meta tensors."""
    device = "cuda" if device_type == "meta" else device_type
    return torch.amp.autocast(device, *args, **kwargs)


def _maybe_autocast(
    device_type: str,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Any:
    """transformers' autocast, which switches nothing for meta tensors."""
    if torch.is_autocast_enabled("cuda") or enabled:
        return torch.amp.autocast("cuda", dtype, enabled, cache_enabled)
    return nullcontext()


_MAYBE_AUTOCAST = "maybe_autocast"

_GROUPED_PRODUCT_CAPABILITY = (8, 0)
"""The smallest with torch's grouped product; below it transformers loops over experts
(transformers.integrations.moe, `_can_use_grouped_mm`)."""


def _askers(name: str) -> list[ModuleType]:
    """The modules of transformers that have imported a function of that name."""
    return [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("transformers.") and name in vars(module)
    ]


def _listed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.tolist, where a truth value of a meta tensor is true."""

    @functools.wraps(original)
    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "meta" or tensor.dtype != torch.bool:
            return original(tensor)
        return torch.ones(tensor.shape, dtype=torch.bool).tolist()

    return tolist


class _KeptOnHost(torch.autograd.graph.saved_tensors_hooks):
    """Saved tensors that leave the card, and come back as copies (save_on_cpu)."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(
            lambda tensor: (tensor.shape, tensor.dtype, tensor.device),
            lambda kept: torch.empty(kept[0], dtype=kept[1], device=kept[2]),
        )


def _copy_of_4bit_weight(weight: Any, memo: Any) -> Any:
    """A copy of the state, then of the codes (bitsandbytes, Params4bit.__deepcopy__).

    The original makes an empty tensor on the host, which cannot become a meta one.
    """
    state = copy.deepcopy(weight.quant_state, memo)
    return type(weight)(
        weight.detach().clone(),
        requires_grad=weight.requires_grad,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        bnb_quantized=weight.bnb_quantized,
        module=weight.module,
    )


def _matmul_8bit_on_cpu(  # noqa: PLR0913 - as the original takes them
    inputs: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    state: Any = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> Any:
    """The product that dequantises the weight (bitsandbytes, `autograd.matmul`)."""
    from bitsandbytes.autograd import _functions

    state.threshold = threshold or state.threshold
    product = _functions.MatMul8bitFp if state.is_training else _functions.MatMul8bitLt
    return product.apply(inputs, weight, out, bias, state)


_WITHOUT_DEVICE: dict[str, Callable[..., Any]] = {
    "bitsandbytes.nn.Params4bit.__deepcopy__": _copy_of_4bit_weight,
    "torch.autocast": _autocast,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
    "torch.utils.checkpoint._infer_device_type": lambda *args: "cuda",
}
"""What stands in whatever the tensors are taken to be on: autocast is switched for a
card all the same, since meta tensors have none."""

_AS_ON_CPU: dict[str, Callable[..., Any]] = {
    **_WITHOUT_DEVICE,
    "bitsandbytes.matmul": _matmul_8bit_on_cpu,
}
"""What bitsandbytes asks the tensors' device about."""

_WITHOUT_CUDA: dict[str, Callable[..., Any]] = {
    **_WITHOUT_DEVICE,
    "transformers.modeling_utils.save_on_cpu": _KeptOnHost,
    "torch.nn.utils.clip_grad._device_has_foreach_support": lambda device: True,
    "torch.nn.utils.clip_grad._has_foreach_support": lambda tensors, device: True,
}
"""What PyTorch asks before it casts for a CUDA card, and before a checkpoint keeps the
state of autocast; answered as where there is a card."""


@contextmanager
def _triton_like() -> Iterator[None]:
    """Lets TRL's fused head take its CUDA path, whose kernels write into its buffers.

    Every label counts, so that what is picked out is all there is; autocast is asked
    for by the device of the hidden states.
    """
    from torch.fx.experimental import _config
    from trl.kernels import chunked_logprob

    # Imported before anything stands in, or it would take that for its own.
    from trl.trainer import utils

    kernel = _NoKernel()
    with ExitStack() as stack:
        for name, replacement in {
            "_use_triton": lambda device: True,
            "_forward_kernel": kernel,
            "_backward_kernel": kernel,
            "_addmm_fp32": _addmm_float32,
            "triton": _NoTriton,
        }.items():
            stack.enter_context(
                mock.patch.object(chunked_logprob, name, replacement, create=True)
            )
        stack.enter_context(
            mock.patch.object(utils, "_use_triton", lambda device: True)
        )
        stack.enter_context(
            mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True)
        )
        stack.enter_context(_asking_for_autocast(unnamed=True))
        yield


@contextmanager
def _asking_for_autocast(*, unnamed: bool) -> Iterator[None]:
    """Lets code ask whether autocast is on for meta tensors.

    Whoever names no device asks about CUDA, as PEFT's quantised layers do: `unnamed`
    says whether that is the device that is meant.
    """
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def asked(device: str | None = None) -> bool:
        return (unnamed or device is not None) and is_enabled("cuda")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", asked))
        stack.enter_context(
            mock.patch.object(
                torch, "get_autocast_dtype", lambda device: dtype_of("cuda")
            )
        )
        yield


class _NoKernel:
    """A Triton kernel that computes nothing: kernel[grid](...)."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _NoTriton:
    """What TRL asks of Triton itself."""

    @staticmethod
    def cdiv(dividend: int, divisor: int) -> int:
        return -(-dividend // divisor)


def _addmm_float32(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """acc += a b, which CUDA computes in place and accumulates in float32."""


def _casting(
    function: Callable[..., Any], cast: Callable[[Any, Any], tuple[Any, Any]]
) -> Callable[..., Any]:
    """The function with its arguments cast wherever autocast is on."""

    @functools.wraps(function)
    def casting(*args: Any, **kwargs: Any) -> Any:
        # Tensors that are made of others take the call before autocast does.
        wraps = any_wraps(map(type, args))
        if torch.is_autocast_enabled("cuda") and not wraps:
            args, kwargs = cast(args, kwargs)
        return function(*args, **kwargs)

    return casting


def _fused_in_half(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Softmax whose kernel casts half precision to float32; bfloat16 is cast before it.

    Source: aten/src/ATen/native/SoftMax.cpp, `softmax` and `log_softmax`.
    """
    fused = getattr(torch.ops.aten, name)

    @functools.wraps(original)
    def softmax(
        input: torch.Tensor, dim: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        if input.dtype == torch.float16 and dtype == torch.float32:
            return fused(input, dim, True)
        return original(input, dim, dtype=dtype, **kwargs)

    return softmax


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if not training or p == 0.0:
        return input
    out: torch.Tensor = torch.ops.aten.native_dropout(input, p, True)[0]
    return out


def _softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return torch.softmax(input, -1 if dim is None else dim, dtype=dtype)


def _log_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return torch.log_softmax(input, -1 if dim is None else dim, dtype=dtype)


def _with_float32_result(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Asks for a float32 result where no precision is asked for."""
    values = args[0] if args else kwargs.get("input")
    named = kwargs.get("dtype") is not None or any(
        isinstance(arg, torch.dtype) for arg in args
    )
    if named or not isinstance(values, torch.Tensor) or not values.is_floating_point():
        return args, kwargs
    return args, kwargs | {"dtype": torch.float32}
