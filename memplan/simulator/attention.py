"""scaled_dot_product_attention by the kernel that the card would take.

Source: aten/src/ATen/native/transformers/attention.cpp. The composite runs above
autograd, so each kernel is called as the operator that it calls on CUDA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from memplan import kernels
from memplan.simulator.trace import Tracer

MASK_STEP = 8
"""`mem_eff_alignment`: numbers at whose multiples a mask's rows begin."""

HEAD_STEP = 8
"""What flash attention's heads are padded to (`pad_last_dim`)."""

FLOAT_BYTES = 4

HEADS_FIRST = 4
"""Sides of (B, H, T, D)."""


class Inputs(NamedTuple):
    """The arguments of scaled_dot_product_attention, in their order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def trains(self) -> bool:
        return any(t.requires_grad for t in (self.query, self.key, self.value))

    @property
    def shapes(self) -> kernels.Shapes:
        """What the choice of a kernel depends on."""
        query, key, value = self.query, self.key, self.value
        return kernels.Shapes(
            query=tuple(query.shape),
            key=tuple(key.shape),
            value=tuple(value.shape),
            dtype=str(query.dtype).removeprefix("torch."),
            masked=self.mask is not None,
            causal=self.is_causal,
            dropout=self.dropout_p,
            grouped=self.enable_gqa and query.shape[1] != key.shape[1],
            dense_rows=all(t.stride(-1) == 1 for t in (query, key, value)),
            trains=self.trains,
        )


def attend(inputs: Inputs, asked: str, tracer: Tracer) -> torch.Tensor:
    """The output, by the kernel asked for or, for `auto`, the one that CUDA takes."""
    kernel = kernels.choose(asked, inputs.shapes, tracer.gpu)
    mask = inputs.mask
    if mask is not None and mask.dtype == torch.bool:
        inputs = inputs._replace(mask=_additive(mask, inputs.query.dtype))
    if kernel == "flash":
        return _flash(inputs)
    if kernel in ("efficient", "cudnn"):
        return _masked(inputs, kernel)
    tracer.sums_in_place = True
    try:
        return _math_with_dropout(inputs) if inputs.dropout_p > 0 else _math(inputs)
    finally:
        tracer.sums_in_place = False


def _flash(inputs: Inputs) -> torch.Tensor:
    """Heads are padded to a multiple of 8, as the composite does."""
    head_dim = inputs.query.shape[-1]
    scale = head_dim**-0.5 if inputs.scale is None else inputs.scale
    missing = -head_dim % HEAD_STEP
    operands: tuple[torch.Tensor, ...] = inputs[:3]
    if missing:
        operands = tuple(functional.pad(t, (0, missing)) for t in operands)
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        *operands, inputs.dropout_p, inputs.is_causal, scale=scale
    )[0]
    return out[..., :head_dim] if missing else out


def _masked(inputs: Inputs, kernel: str) -> torch.Tensor:
    """The kernels that take a mask."""
    mask = _aligned(inputs) if kernel == "efficient" else inputs.mask
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    out: torch.Tensor = operator(
        inputs.query,
        inputs.key,
        inputs.value,
        mask,
        inputs.trains,
        inputs.dropout_p,
        inputs.is_causal,
        scale=inputs.scale,
    )[0]
    return out


def attend_on_cpu(inputs: Inputs, asked: str, tracer: Tracer) -> torch.Tensor:
    """Attention as PyTorch computes it on a CPU: by its flash kernel, or by math.

    Source: aten/src/ATen/native/transformers/sdp_utils_cpp.cpp,
    `select_sdp_backend_cpp` and `use_flash_attention_cpp`.
    """
    if asked == "math" or not _has_cpu_kernel(inputs):
        tracer.sums_in_place = True
        try:
            return _math(inputs)
        finally:
            tracer.sums_in_place = False
    mask = inputs.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, inputs.query.dtype)
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *inputs[:3],
        inputs.dropout_p,
        inputs.is_causal,
        attn_mask=mask,
        scale=inputs.scale,
    )[0]
    return out


def _has_cpu_kernel(inputs: Inputs) -> bool:
    tensors = inputs[:3]
    return (
        inputs.dropout_p == 0.0
        and all(tensor.dim() == HEADS_FIRST for tensor in tensors)
        and len({tensor.shape[-1] for tensor in tensors}) == 1
        and all(tensor.stride(-1) == 1 for tensor in tensors)
    )


def _math(inputs: Inputs) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        *inputs[:6], None, scale=inputs.scale, enable_gqa=inputs.enable_gqa
    )[0]
    return out


def _math_with_dropout(inputs: Inputs) -> torch.Tensor:
    """`_scaled_dot_product_attention_math`, whose dropout asks for a CUDA tensor.

    Names keep alive what the original's locals do.
    """
    matmul = torch.ops.aten.matmul
    query, mask, scale = inputs.query, inputs.mask, inputs.scale
    q, k, v = (
        t.float() if t.element_size() < FLOAT_BYTES else t
        for t in (query, inputs.key, inputs.value)
    )
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scaled = q * factor
    if inputs.is_causal:
        mask = _additive(_lower_triangle(q, k), q.dtype)
    if inputs.enable_gqa:
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scores = matmul(scaled, k.transpose(-2, -1) * factor)
    if mask is not None:
        scores = scores + mask
    weights = torch.ops.aten._safe_softmax(scores, -1)
    kept = torch.ops.aten.native_dropout(weights, inputs.dropout_p, True)[0]
    second_result = kept.to(query.dtype)
    out: torch.Tensor = matmul(kept, v).to(query.dtype)
    del second_result
    return out


def _lower_triangle(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    shape = (q.shape[-2], k.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=q.device).tril()


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of truth values as what is added (`convert_boolean_attn_mask`)."""
    shown = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    hidden = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, shown, hidden)


def _aligned(inputs: Inputs) -> torch.Tensor | None:
    """The mask over all heads, its rows padded where they do not begin at 16 bytes.

    Padded before it is expanded, by up to a whole step (`preprocess_mask`, `pad_bias`).
    """
    mask = inputs.mask
    if mask is None:
        return None
    length = mask.shape[-1]
    strides = mask.stride()
    if strides[-1] != 1 or any(stride % MASK_STEP for stride in strides[:-1]):
        padded = functional.pad(mask, (0, MASK_STEP - length % MASK_STEP))
        mask = padded[..., :length]
    return mask.expand(*inputs.query.shape[:-1], inputs.key.shape[-2])
