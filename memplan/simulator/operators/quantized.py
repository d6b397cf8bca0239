"""bitsandbytes' CUDA operators.

Source: bitsandbytes `backends/cuda/ops.py`: `gemm_4bit`, `_dequant_linear_fallback`,
`int8_vectorwise_quant`, `int8_mixed_scaled_mm`, `int8_scaled_mm`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memplan.cublas import workspace_bytes
from memplan.simulator.operators import Call, rule, tensor_bytes
from memplan.simulator.operators.gemm import is_readable
from memplan.simulator.operators.hardware import multiprocessors

LARGEST_FUSED_TOKENS = 1536
"""Tokens above which the weight is always dequantised (`_gemm_4bit_custom_max_m`)."""


@rule("bitsandbytes::gemm_4bit")
def gemm_4bit(call: Call) -> None:
    """One kernel for few tokens; else the weight is dequantised beside the product.

    Dequantising holds the absmax values in float32, twice where they are quantised
    themselves, and the weight in the input's precision. The product is torch's own, so
    autocast casts both its operands, and its result stays in autocast's precision.
    """
    inputs, _, shape, _, block_size = call.args[:5]
    if _is_fused(call, inputs, shape, block_size):
        if not inputs.is_contiguous():
            call.temporary(tensor_bytes(inputs))
        return
    nested = call.argument(7, "absmax_8bit")
    if nested is not None:
        call.temporary(4 * nested.numel())
        call.temporary(4 * nested.numel())
    num_weights = math.prod(shape)
    call.temporary(num_weights * inputs.element_size())
    dtype = product_dtype(inputs)
    if dtype != inputs.dtype:
        call.temporary(tensor_bytes(inputs, dtype.itemsize))
        call.temporary(num_weights * dtype.itemsize)
    out_shape = (*inputs.shape[:-1], shape[0])
    call.give(torch.empty(out_shape, dtype=dtype, device=inputs.device))
    if not is_readable(inputs.reshape(-1, inputs.shape[-1])):
        call.temporary(tensor_bytes(inputs))
    call.workspace(workspace_bytes(call.gpu))


@rule("bitsandbytes::int8_vectorwise_quant")
def int8_vectorwise_quant(call: Call) -> None:
    """Row scales, rows, then |x| and a mask of outliers; none are assumed to exist."""
    inputs = call.args[0]
    rows = inputs.numel() // inputs.shape[-1]
    scales = torch.empty(rows, dtype=torch.float32, device=inputs.device)
    quantized = torch.empty(inputs.shape, dtype=torch.int8, device=inputs.device)
    if call.argument(1, "threshold", 0.0) == 0.0:
        call.give((quantized, scales, None), order=(1, 0))
        return
    columns = torch.empty(0, dtype=torch.int64, device=inputs.device)
    call.give((quantized, scales, columns), order=(1, 0, 2))
    absolute = call.temporary(tensor_bytes(inputs))
    call.temporary(inputs.numel())
    call.free(absolute)
    call.temporary(1)


@rule("bitsandbytes::int8_mixed_scaled_mm")
def int8_mixed_scaled_mm(call: Call) -> None:
    """The product in int32, then in half precision, then in the input's."""
    inputs, _, weight = call.args[:3]
    rest = torch.empty(0, dtype=inputs.dtype, device=inputs.device)
    _int8_product(call, inputs, weight, inputs.dtype, rest)


@rule("bitsandbytes::int8_scaled_mm")
def int8_scaled_mm(call: Call) -> None:
    """As the mixed product, without outliers."""
    quantized, weight = call.args[:2]
    dtype = call.argument(5, "dtype") or torch.float16
    _int8_product(call, quantized, weight, dtype)


def _int8_product(
    call: Call,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    *others: torch.Tensor,
) -> None:
    shape = (*inputs.shape[:-1], weight.shape[0])
    out = torch.empty(shape, dtype=dtype, device=inputs.device)
    call.temporary(4 * out.numel())
    if dtype != torch.float16:
        call.temporary(2 * out.numel())
    call.give((out, *others) if others else out)


def product_dtype(inputs: torch.Tensor) -> torch.dtype:
    """The precision in which torch multiplies: autocast's where it is on.

    Autocast stays on inside of an operator whose kernel is Python.
    """
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return inputs.dtype


def _is_fused(
    call: Call, inputs: torch.Tensor, shape: tuple[int, int], block_size: int
) -> bool:
    tokens = inputs.numel() // inputs.shape[-1]
    if tokens > LARGEST_FUSED_TOKENS or inputs.shape[-1] % block_size:
        return False
    major, minor = call.gpu.compute_capability
    card = (multiprocessors(call.gpu), major, minor)
    return bool(_fused_heuristic(card)(0, inputs.dtype, tokens, shape[0], shape[1]))


@functools.cache
def _fused_heuristic(card: tuple[int, int, int]) -> Callable[..., bool]:
    """bitsandbytes' own choice of the fused kernel, for a card that is not here.

    Its module cannot be imported without CUDA, so the one function is taken out of the
    installed file. Versions without it fuse single rows alone.
    """
    name = "_gemm_4bit_use_custom_cuda"
    spec = importlib.util.find_spec("bitsandbytes.backends.cuda")
    folder = Path(str(spec.origin)).parent if spec else Path()
    tree = ast.parse((folder / "ops.py").read_text(encoding="utf-8"))
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if not functions:
        return lambda index, dtype, tokens, n, k: tokens == 1
    functions[0].decorator_list = []
    scope: dict[str, Any] = {
        "torch": torch,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda index: card,
    }
    code = compile(ast.Module([*functions], []), str(folder / "ops.py"), "exec")
    exec(code, scope)
    heuristic: Callable[..., bool] = scope[name]
    return heuristic
