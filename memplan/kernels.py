"""Which attention kernel PyTorch takes on a card.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `select_sdp_backend`: the
first kernel of the order that can run. Shapes: query (B, H, M, D), key (B, Hk, N, D).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memplan.errors import InputError
from memplan.gpu import Gpu

KERNELS = ("flash", "efficient", "math", "cudnn")
"""torch.nn.attention.SDPBackend's kernels, in their usual order."""

_FLASH_BACKWARD_LIMIT = 192
"""Largest head whose flash backward fits the shared memory of 8.6 to 8.9 and 12.x."""

_CUDNN_HEAD_LIMIT = 128
"""Largest head of cuDNN attention in torch 2.13 (`check_cudnn_tensor_shapes`)."""

_CUDNN_LATENT_HEADS = (192, 128)
"""Query and value heads that cuDNN takes besides on data-centre Blackwell: those of
multi-head latent attention (pytorch#172621)."""

_CUDNN_DROPOUT_STEPS = 16
"""cuDNN knows dropout probabilities in steps of 1/16 (`check_cudnn_dropout`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What scaled_dot_product_attention was given."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    masked: bool
    causal: bool
    dropout: float
    """The probability."""
    grouped: bool
    """Whether key and value may have fewer heads than query (`enable_gqa`) and do."""
    dense_rows: bool = True
    """Whether the last side of each lies contiguous in memory."""
    trains: bool


def choose(asked: str, shapes: Shapes, gpu: Gpu) -> str:
    """The kernel that runs; raises InputError where a pinned one cannot."""
    if asked not in KERNELS:
        return first(_order(gpu), shapes, gpu)
    obstacle = _obstacle(asked, shapes, gpu)
    if obstacle:
        raise InputError(
            "attention", asked, f"cannot run here: {obstacle}", "use attention auto"
        )
    return asked


def first(order: Iterable[str], shapes: Shapes, gpu: Gpu) -> str:
    """The first kernel of an order that can run; math always can."""
    return next(kernel for kernel in order if not _obstacle(kernel, shapes, gpu))


def _order(gpu: Gpu) -> tuple[str, ...]:
    """On Hopper and data-centre Blackwell, cuDNN comes first."""
    if gpu.compute_capability in ((9, 0), (10, 0), (10, 3)):
        return ("cudnn", "flash", "efficient", "math")
    return KERNELS


def _obstacle(kernel: str, shapes: Shapes, gpu: Gpu) -> str:
    """Why a kernel cannot run; empty where it can."""
    obstacle = _OBSTACLES.get(kernel)
    if obstacle is None:
        return ""
    if _has_unequal_heads(shapes):
        return f"{kernel} attention needs as many heads of keys as of queries"
    return obstacle(shapes, gpu)


def _has_unequal_heads(shapes: Shapes) -> bool:
    """Heads that only the math kernel broadcasts: `enable_gqa` was not asked for.

    Source: sdp_utils_cpp.h, `check_batch_size_and_num_heads_dense`; Falcon's one head
    of keys on an H100 (profiles/runs).
    """
    return not shapes.grouped and shapes.query[-3] != shapes.key[-3]


def _flash_obstacle(shapes: Shapes, gpu: Gpu) -> str:
    head_dim = shapes.query[-1]
    if gpu.compute_capability < (8, 0):
        return f"flash attention needs capability 8.0, {_card(gpu)}"
    if not shapes.dense_rows:
        return "flash attention needs heads that lie contiguous in memory"
    if shapes.causal and shapes.query[-2] != shapes.key[-2]:
        return "causal flash attention needs as many keys as queries"
    if shapes.dtype not in ("float16", "bfloat16"):
        return f"flash attention takes half precision, the query is {shapes.dtype}"
    if shapes.masked:
        return "flash attention takes no mask, and the batch or the model needs one"
    if head_dim != shapes.value[-1]:
        return (
            f"flash attention needs equal heads, not {head_dim} and {shapes.value[-1]}"
        )
    if head_dim > 256:
        return f"flash attention takes heads up to 256, not {head_dim}"
    too_large = head_dim <= 224 or shapes.dropout > 0
    if (
        _has_small_memory(gpu)
        and shapes.trains
        and (head_dim > _FLASH_BACKWARD_LIMIT and too_large)
    ):
        return f"the flash backward of heads of {head_dim} does not fit, {_card(gpu)}"
    return ""


def _has_small_memory(gpu: Gpu) -> bool:
    return (8, 6) <= gpu.compute_capability <= (8, 9) or gpu.compute_capability[0] == 12


def _efficient_obstacle(shapes: Shapes, gpu: Gpu) -> str:
    if shapes.dtype == "bfloat16" and gpu.compute_capability < (8, 0):
        return f"memory-efficient attention in bfloat16 needs 8.0, {_card(gpu)}"
    if shapes.grouped:
        return "memory-efficient attention takes no grouped heads"
    if not shapes.dense_rows:
        return "memory-efficient attention needs heads that lie contiguous in memory"
    multiple = _efficient_alignment(shapes, gpu)
    for head_dim in (shapes.query[-1], shapes.value[-1]):
        if head_dim % multiple:
            return f"memory-efficient attention needs heads in multiples of {multiple}"
    return ""


def _efficient_alignment(shapes: Shapes, gpu: Gpu) -> int:
    """16 bytes where tensor cores multiply: half precision from 7.0, all from 8.0.

    Source: `minimum_gemm_alignment`.
    """
    half = shapes.dtype in ("float16", "bfloat16")
    major = gpu.compute_capability[0]
    if major >= 8:
        return 8 if half else 4
    return 8 if half and major == 7 else 1


def _cudnn_obstacle(shapes: Shapes, gpu: Gpu) -> str:
    if gpu.compute_capability < (8, 0):
        return f"cuDNN attention needs capability 8.0, {_card(gpu)}"
    if shapes.dtype not in ("float16", "bfloat16"):
        return f"cuDNN attention takes half precision, the query is {shapes.dtype}"
    if not shapes.dense_rows:
        return "cuDNN attention needs heads that lie contiguous in memory"
    if (shapes.dropout * _CUDNN_DROPOUT_STEPS) % 1:
        return f"cuDNN attention takes dropout in sixteenths, not {shapes.dropout:g}"
    if shapes.key[-2] == 1:
        return "cuDNN attention takes no single key"
    return _cudnn_head_obstacle((shapes.query[-1], shapes.value[-1]), gpu)


def _cudnn_head_obstacle(heads: tuple[int, int], gpu: Gpu) -> str:
    if heads == _CUDNN_LATENT_HEADS and gpu.compute_capability[0] == 10:
        return ""
    for head_dim in heads:
        if head_dim > _CUDNN_HEAD_LIMIT or head_dim % 8:
            return f"cuDNN attention takes heads up to 128 in eights, not {head_dim}"
    return ""


def _card(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability
    return f"{gpu.name} has {major}.{minor}"


_OBSTACLES = {
    "flash": _flash_obstacle,
    "efficient": _efficient_obstacle,
    "cudnn": _cudnn_obstacle,
}
"""What may keep a kernel from running; nothing keeps math."""
