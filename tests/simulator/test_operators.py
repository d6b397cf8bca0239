"""What each rule allocates inside its operator, worked by hand, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401 (registers its operators)
import pytest
import torch
from storage_meter import tensors

from memplan.gpu import Gpu, find_gpu
from memplan.simulator.events import EMPTY_CACHE, FREE, MARK, EventLog
from memplan.simulator.operators.attention import flash_splits
from memplan.simulator.trace import Tracer

T4 = find_gpu("T4")
A100 = find_gpu("A100 80GB")
RTX_3060 = find_gpu("RTX 3060")
H100 = find_gpu("H100")
WORKSPACE = 8_519_680
"""cuBLAS's, 4096 * 2 + 16 * 8 KiB; 32 MiB on Hopper."""

HALF, SINGLE = torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """(B, H, M, D) that lies in memory as (B, M, H, D), as a projection gives it."""
    batch, heads, rows, size = shape
    return meta(batch, rows, heads, size, dtype=dtype).transpose(1, 2)


def sizes(
    gpu: Gpu, operator: Callable[..., Any], *args: Any, **kwargs: Any
) -> list[int]:
    """Bytes allocated, and with a minus sign released, while the operator runs."""
    log = EventLog()
    log.begin("1.forward")
    tracer = Tracer(gpu, log, padded=False)
    for tensor in tensors((args, kwargs)):
        tracer.hold(tensor, log.allocate(0, "held"))
    first = len(log.events)
    with tracer:
        result = operator(*args, **kwargs)
    events = log.events[first:]
    assert not any(block in (MARK, EMPTY_CACHE) for block, _ in events)
    del result
    return [-log.sizes[b] if n == FREE else n for b, n in events]


aten = torch.ops.aten


def test_softmax_backward_holds_the_product_of_gradient_and_output() -> None:
    scores = meta(2, 4, 8, 8)
    num_bytes = 2 * 4 * 8 * 8 * 4

    found = sizes(T4, aten._softmax_backward_data, scores, scores, -1, SINGLE)

    assert found == [num_bytes, num_bytes, -num_bytes]


def test_fused_softmax_backward_gives_half_but_multiplies_in_single_precision() -> None:
    scores = meta(2, 4, 8, 8)

    found = sizes(T4, aten._softmax_backward_data, scores, scores, -1, HALF)

    assert found == [1024, 2048, -2048]


def test_log_softmax_backward_holds_nothing() -> None:
    scores = meta(16, 100)

    found = sizes(T4, aten._log_softmax_backward_data, scores, scores, -1, SINGLE)

    assert found == [6400]


def test_softmax_copies_an_input_of_another_layout() -> None:
    assert sizes(T4, aten._softmax, meta(8, 16).t(), 1, False) == [512, 512, -512]


def test_safe_softmax_writes_its_zeros_into_its_result() -> None:
    """softmax, x == -inf, its rows, a scalar: as an H100's history has it."""
    found = sizes(A100, aten._safe_softmax, meta(2, 4, 8, 8), -1)

    assert found[:4] == [2048, 512, 64, 4]
    assert sorted(found[4:]) == [-512, -64, -4]


def test_dropout_allocates_its_mask_before_its_output() -> None:
    found = sizes(T4, aten.native_dropout, meta(10, 100, dtype=HALF), 0.1, True)

    assert found == [1000, 2000]


def test_flash_backward_accumulates_in_single_precision() -> None:
    """130 rows become 256 and a head of 40 becomes 64; 4 query heads share 2."""
    q, k = heads(2, 4, 130, 40), heads(2, 2, 130, 40)
    d_q, d_kv = 2 * 4 * 130 * 40 * 2, 2 * 2 * 130 * 40 * 2
    row_sums, accumulator = 4 * 2 * 4 * 256, 4 * 2 * 256 * 4 * 64

    found = _flash_backward(q, q, k, q)

    assert found[:7] == [d_q, d_kv, d_kv, row_sums, accumulator, d_q, d_q]
    assert sum(found) == d_q + 2 * d_kv


def test_flash_backward_copies_a_gradient_of_another_layout_first() -> None:
    q = heads(1, 2, 128, 64)
    plain = meta(1, 2, 128, 64, dtype=HALF)

    assert _flash_backward(plain, q, q, q)[0] == 128 * 2 * 64 * 2


def _flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor
) -> list[int]:
    rows = q.shape[2]
    return sizes(
        A100,
        aten._scaled_dot_product_flash_attention_backward,
        grad,
        q,
        k,
        k,
        out,
        meta(*q.shape[:3]),
        torch.empty(0, device="meta"),
        torch.empty(0, device="meta"),
        rows,
        rows,
        0.0,
        True,
        meta(2, dtype=torch.uint64),
        torch.empty((), dtype=torch.uint64, device="meta"),
    )


def test_flash_splits_keys_where_queries_do_not_fill_the_card() -> None:
    """128 tiles on 216 slots: 1 and 2 splits keep 59 % at work, 4 splits 79 %."""
    assert flash_splits((1, 16, 512, 128), 512, 108) == 4
    assert flash_splits((1, 32, 512, 128), 512, 108) == 1
    q = heads(1, 16, 512, 128)

    found = sizes(A100, aten._scaled_dot_product_flash_attention, q, q, q, 0.0, True)

    row_sums = 4 * 16 * 512 * 4
    assert found[-4:] == [row_sums, row_sums * 128, -row_sums, -row_sums * 128]


def test_flash_does_not_split_under_dropout() -> None:
    q = heads(1, 16, 512, 128)

    found = sizes(A100, aten._scaled_dot_product_flash_attention, q, q, q, 0.1, True)

    assert min(found) >= 0


@pytest.mark.parametrize(("head_dim", "accumulator"), [(64, 0), (256, 4)])
def test_efficient_attention_keeps_its_seeds_on_the_host(
    head_dim: int, accumulator: int
) -> None:
    """Above 128, half precision accumulates the output in float32."""
    q = heads(1, 2, 100, head_dim)
    numbers = 2 * 100 * head_dim
    gathered = [accumulator * numbers, -accumulator * numbers] if accumulator else []

    found = sizes(
        T4, aten._scaled_dot_product_efficient_attention, q, q, q, None, True, 0.0, True
    )

    assert found == [2 * numbers, 4 * 2 * 128, *gathered]


@pytest.mark.parametrize(
    ("gpu", "head_dim", "workspace"),
    [
        # 2 tiles of 64 x 64 floats, with 16 bytes each beside them, for 2 heads
        (T4, 64, 2 * 2 * (16 + 4 * 64 * 64)),
        # 1 tile of 128 rows by 2 of 64 columns
        (T4, 128, 2 * 2 * (16 + 4 * 128 * 64)),
        (A100, 128, 2 * (16 + 4 * 128 * 128)),
        (H100, 128, 2 * (16 + 4 * 128 * 128)),
        # 2 x 2 tiles, and dK and dV in 2 splits of 64 keys
        (RTX_3060, 128, 2 * (4 * (16 + 4 * 64 * 64) + 2 * 4 * 2 * 64 * 128)),
    ],
)
def test_efficient_backward_holds_delta_and_a_workspace_by_chip(
    gpu: Gpu, head_dim: int, workspace: int
) -> None:
    q = heads(1, 2, 100, head_dim)
    gradient, delta = 2 * 100 * head_dim * 2, 4 * 2 * 100

    found = _efficient_backward(gpu, q)

    assert found == [gradient] * 3 + [delta, workspace, -delta, -workspace]


def test_efficient_backward_makes_delta_by_hand_in_single_precision() -> None:
    q = heads(1, 2, 64, 64, dtype=SINGLE)
    gradient, sums = 2 * 64 * 64 * 4, 2 * 64 * 4
    workspace = 2 * (16 + 4 * 64 * 64)

    found = _efficient_backward(A100, q)

    assert found == [
        *[gradient] * 3,
        *[gradient, sums, sums, -gradient, -sums],
        *[workspace, -sums, -workspace],
    ]


def _efficient_backward(gpu: Gpu, q: torch.Tensor) -> list[int]:
    seed = torch.empty((), dtype=torch.int64)
    return sizes(
        gpu,
        aten._scaled_dot_product_efficient_attention_backward,
        q,
        q,
        q,
        q,
        None,
        q,
        meta(*q.shape[:3]),
        seed,
        seed,
        0.0,
        [True, True, True, False],
        True,
    )


def test_cudnn_backward_has_one_workspace() -> None:
    q = heads(1, 2, 100, 64)
    gradient = 2 * 100 * 64 * 2
    workspace = 4 * 2 * 100 * (64 + 1)
    seed = torch.empty((), dtype=torch.int64, device="meta")

    found = sizes(
        H100,
        aten._scaled_dot_product_cudnn_attention_backward,
        *(q, q, q, q, q, meta(1, 2, 100, 1), seed, seed),
        *(None, None, None, 100, 100, 0.0, True),
    )

    assert found == [gradient] * 3 + [workspace, -workspace]


@pytest.mark.parametrize(("gpu", "workspace"), [(T4, WORKSPACE), (H100, 32 * 2**20)])
def test_products_copy_what_cublas_cannot_read(gpu: Gpu, workspace: int) -> None:
    strided = meta(8, 32)[:, ::2]

    found = sizes(gpu, torch.mm, strided, meta(16, 4))
    transposed = sizes(gpu, torch.mm, meta(16, 8).t(), meta(16, 4))

    assert found == [8 * 4 * 4, 8 * 16 * 4, workspace, -8 * 16 * 4]
    assert transposed == [8 * 4 * 4, workspace]


def test_a_batch_may_lie_anywhere_but_its_matrices_must_be_readable() -> None:
    expanded = meta(1, 8, 16).expand(4, 8, 16)
    strided = meta(4, 8, 32)[:, :, ::2]

    assert sizes(T4, torch.bmm, expanded, meta(4, 16, 2)) == [256, WORKSPACE]
    assert sizes(T4, torch.bmm, strided, meta(4, 16, 2))[1] == 4 * 8 * 16 * 4


def test_grouped_products_on_hopper_hold_addresses_and_descriptors() -> None:
    """For 64 groups, 3 addresses, 3 strides and 3 sizes; 4 descriptors a processor."""
    found = _grouped(H100, torch.bfloat16)
    arguments, descriptors = 64 * (24 + 24 + 12), 4 * 128 * 132

    assert found == [
        *[GROUPED_BYTES, arguments, descriptors],
        *[-arguments, -descriptors],
    ]


@pytest.mark.parametrize(("gpu", "dtype"), [(A100, torch.bfloat16), (H100, HALF)])
def test_grouped_products_elsewhere_are_a_loop(gpu: Gpu, dtype: torch.dtype) -> None:
    workspace = 32 * 2**20 if gpu is H100 else WORKSPACE

    assert _grouped(gpu, dtype) == [GROUPED_BYTES, workspace]


GROUPED_BYTES = (999 * 24 + 20) * 2
"""1000 rows of 20, each but the last padded to 16 bytes."""


def _grouped(gpu: Gpu, dtype: torch.dtype) -> list[int]:
    """1000 rows of 16 by 64 matrices of 16 x 20."""
    weights = meta(64, 20, 16, dtype=dtype).transpose(1, 2)
    offsets = meta(64, dtype=torch.int32)
    return sizes(gpu, aten._grouped_mm, meta(1000, 16, dtype=dtype), weights, offsets)


def test_embedding_backward_sorts_above_3072_indices() -> None:
    """4000 indices into 50 rows of 8: 4000 / 10 + 50 partial sums."""
    grad, many = meta(4000, 8), meta(4000, dtype=torch.int64)
    few = meta(3072, dtype=torch.int64)
    backward = aten.embedding_dense_backward
    indices, table, partials = 8 * 4000, 50 * 8 * 4, 450

    small = sizes(A100, backward, meta(3072, 8), few, 50, -1, False)
    found = sizes(A100, backward, grad, many, 50, -1, False)

    assert small == [table]
    assert found[:6] == [*[indices] * 3, 2 * indices, -2 * indices, -indices]
    assert found[6:12] == [table, indices, 400, 400, 8 * partials, 4 * partials * 8]
    assert sum(found) == table


@pytest.mark.parametrize(
    ("gpu", "shape", "scratch"),
    [
        # 16 columns of blocks of 32 x 4 threads, 4 outputs each. T4: 320 blocks fit,
        # 20 a column. Others: 2048 rows give each of 4 rows of threads 512 numbers,
        # and blocks are added until 16 are left: 32.
        (T4, (2048, 2048), 4 * 2048 * 20 * 32 * 4),
        (A100, (2048, 2048), 4 * 2048 * 32 * 32 * 4),
        (H100, (2048, 2048), 4 * 2048 * 32 * 32 * 4),
        # 32 columns; 1728 and 2112 blocks fit: 54 and 66 a column
        (A100, (8192, 4096), 4 * 4096 * 54 * 32 * 4),
        (H100, (8192, 4096), 4 * 4096 * 66 * 32 * 4),
    ],
)
def test_sums_of_columns_keep_a_part_for_every_thread(
    gpu: Gpu, shape: tuple[int, int], scratch: int
) -> None:
    columns = shape[1]
    semaphores = 4 * columns // (4 * 32)

    found = sizes(gpu, aten.sum.dim_IntList, meta(*shape), [0])

    assert found == [4 * columns, scratch, semaphores, -scratch, -semaphores]


def test_sums_of_rows_need_no_buffer() -> None:
    assert sizes(A100, aten.mean.dim, meta(2048, 4096), [-1]) == [8192]


def test_truth_values_are_summed_as_a_copy_of_integers() -> None:
    mask = meta(4, 8, dtype=torch.bool)

    assert sizes(T4, aten.sum, mask) == [8, 4 * 8 * 8, -4 * 8 * 8]
    assert sizes(T4, aten.cumsum, mask, -1) == [256, 256, -256]
    assert sizes(T4, aten.all, mask) == [1]


def test_norms_of_a_list_share_a_buffer_of_chunks() -> None:
    """70,000 numbers are two chunks of 65,536, for each of two tensors."""
    found = sizes(T4, torch._foreach_norm, [meta(100), meta(70_000)])

    assert found == [4 * 2 * 2, 4, 4, -4 * 2 * 2]


@pytest.mark.parametrize(
    ("side", "extra"),
    [
        (4096, []),
        # positions, then keys and positions once more
        (5000, [40_000, 16 * 5000, -16 * 5000, -40_000]),
    ],
)
def test_long_sorts_are_radix_sorts(side: int, extra: list[int]) -> None:
    experts = meta(side, dtype=torch.int64)

    assert sizes(A100, torch.sort, experts) == [8 * side, 8 * side, *extra]


def test_the_gradient_of_indexing_is_added_into_its_zeros() -> None:
    rows = meta(10, 8).requires_grad_()
    picked = meta(30, dtype=torch.int64)
    out = rows[picked]

    found = sizes(A100, out.backward, meta(30, 8))

    zeros, indices = 10 * 8 * 4, 8 * 30
    assert found == [
        zeros,
        *[indices] * 3,
        *[indices, 2 * indices, -2 * indices, -indices],
        *[-indices] * 3,
    ]


def test_several_indices_are_laid_out_alike() -> None:
    table = meta(2, 100, dtype=torch.bool)
    rows, columns = meta(2, 1, dtype=torch.int64), meta(1, 100, dtype=torch.int64)
    expanded = 8 * 2 * 100

    found = sizes(A100, lambda *i: table[i], rows, columns)

    assert found == [expanded, expanded, 200, -expanded, -expanded]


def test_masked_scatter_numbers_the_mask() -> None:
    values, mask = meta(4, 8), meta(4, 8, dtype=torch.bool)

    assert sizes(A100, torch.masked_scatter, values, mask, values) == [128, 256, -256]


def test_layer_norm_backward_sums_many_short_rows_in_parts() -> None:
    """100,000 rows of 64: 2 blocks of columns, 3125 of rows of 32."""
    found = _layer_norm_backward(100_000)
    part = 3125 * 64 * 4

    assert found[3:] == [part, part, -part, -part]
    assert _layer_norm_backward(1000) == [1000 * 64 * 4, 256, 256]


def _layer_norm_backward(rows: int) -> list[int]:
    x, row, weight = meta(rows, 64), meta(rows, 1), meta(64)
    return sizes(
        A100,
        aten.native_layer_norm_backward,
        *(x, x, [64], row, row, weight, weight, [True, True, True]),
    )


def test_triangular_systems_are_solved_by_address() -> None:
    systems = meta(100, 64, 64)
    found = sizes(A100, torch.linalg.solve_triangular, systems, systems, upper=False)

    assert found == [100 * 64 * 64 * 4, 800, 800, WORKSPACE, -800, -800]


def test_a_convolution_keeps_its_inputs_layout() -> None:
    """(B, C, T) whose channels lie closest gives such an output, without a copy."""
    x, weight = meta(2, 50, 16).transpose(1, 2), meta(16, 1, 4)
    log = EventLog()
    log.begin("1.forward")
    with Tracer(A100, log, padded=False):
        out = torch.nn.functional.conv1d(x, weight, padding=3, groups=16)

    assert out.stride() == (53 * 16, 1, 16)
    assert [n for b, n in log.events if b >= 0] == [2 * 16 * 53 * 4]


def _linear_4bit(gpu: Gpu, tokens: int, *, nested: bool) -> list[int]:
    """A layer of 1024 x 1024 in blocks of 64: 16,384 absmax values."""
    absmax = meta(16_384, dtype=torch.uint8 if nested else SINGLE)
    state = (absmax, meta(256), meta(64)) if nested else (None, None, None)
    return sizes(
        gpu,
        torch.ops.bitsandbytes.gemm_4bit,
        meta(tokens, 1024, dtype=HALF),
        meta(1024 * 1024 // 2, 1, dtype=torch.uint8),
        [1024, 1024],
        meta(64) if nested else absmax,
        64,
        "nf4",
        None,
        *state[:1],
    )


def test_few_tokens_are_multiplied_in_four_bits() -> None:
    assert _linear_4bit(T4, 4, nested=False) == [4 * 1024 * 2]


def test_many_tokens_dequantise_the_weight_beside_the_product() -> None:
    weight, out, absmax = 1024 * 1024 * 2, 2048 * 1024 * 2, 4 * 16_384

    plain = _linear_4bit(T4, 2048, nested=False)
    nested = _linear_4bit(T4, 2048, nested=True)

    assert plain == [weight, out, WORKSPACE, -weight]
    assert nested[:5] == [absmax, absmax, weight, out, WORKSPACE]
    assert sum(nested) == out + WORKSPACE


def test_int8_rows_are_searched_for_outliers() -> None:
    """Scales, rows, |x|, the mask of outliers and whether there are any."""
    found = sizes(
        T4, torch.ops.bitsandbytes.int8_vectorwise_quant, meta(10, 64, dtype=HALF), 6.0
    )

    assert [n for n in found if n] == [40, 640, 1280, 640, -1280, 1, -640, -1]


@pytest.mark.parametrize(("dtype", "middle"), [(HALF, []), (SINGLE, [10 * 32 * 2])])
def test_int8_products_pass_through_int32_and_half(
    dtype: torch.dtype, middle: list[int]
) -> None:
    found = sizes(
        T4,
        torch.ops.bitsandbytes.int8_scaled_mm,
        meta(10, 64, dtype=torch.int8),
        meta(32, 64, dtype=torch.int8),
        meta(10),
        meta(32),
        None,
        dtype,
    )

    out = 10 * 32 * dtype.itemsize
    assert found[: 2 + len(middle)] == [10 * 32 * 4, *middle, out]
    assert sum(found) == out
