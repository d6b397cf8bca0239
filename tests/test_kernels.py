"""Which attention kernel a card takes (aten/.../transformers/cuda/sdp_utils.cpp)."""

from __future__ import annotations

import dataclasses

import pytest

from memplan.errors import InputError
from memplan.gpu import Gpu, find_gpu
from memplan.kernels import Shapes, choose

T4 = find_gpu("T4")
A100 = find_gpu("A100 80GB")
RTX_3060 = find_gpu("RTX 3060")
L4 = find_gpu("L4")
H100 = find_gpu("H100")
B200 = find_gpu("B200")
P100 = dataclasses.replace(T4, name="P100", compute_capability=(6, 0))
V100 = dataclasses.replace(T4, name="V100", compute_capability=(7, 0))

LLAMA = Shapes(
    query=(2, 32, 512, 128),
    key=(2, 32, 512, 128),
    value=(2, 32, 512, 128),
    dtype="float16",
    masked=False,
    causal=True,
    dropout=0.0,
    grouped=False,
    trains=True,
)


def heads(size: int, value_size: int | None = None, **changes: object) -> Shapes:
    side = (2, 32, 512)
    return dataclasses.replace(
        LLAMA,
        query=(*side, size),
        key=(*side, size),
        value=(*side, value_size or size),
        **changes,
    )


GROUPED = dataclasses.replace(
    LLAMA, key=(2, 8, 512, 128), value=(2, 8, 512, 128), grouped=True
)
MASKED = dataclasses.replace(LLAMA, masked=True, causal=False)


@pytest.mark.parametrize(
    ("shapes", "turing", "ampere", "hopper"),
    [
        pytest.param(LLAMA, "efficient", "flash", "cudnn", id="fp16 causal"),
        pytest.param(GROUPED, "math", "flash", "cudnn", id="fp16 grouped"),
        pytest.param(MASKED, "efficient", "efficient", "cudnn", id="fp16 masked"),
    ],
)
def test_half_precision(shapes: Shapes, turing: str, ampere: str, hopper: str) -> None:
    for gpu, kernel in ((T4, turing), (A100, ampere), (L4, ampere), (H100, hopper)):
        assert choose("auto", shapes, gpu) == kernel


@pytest.mark.parametrize("shapes", [LLAMA, GROUPED, MASKED])
def test_turing_has_no_fused_kernel_for_bfloat16(shapes: Shapes) -> None:
    bfloat16 = dataclasses.replace(shapes, dtype="bfloat16")

    assert choose("auto", bfloat16, T4) == "math"
    assert choose("auto", bfloat16, A100) == choose("auto", shapes, A100)


@pytest.mark.parametrize("gpu", [T4, A100, L4, H100])
def test_single_precision_is_efficient_unless_heads_are_grouped(gpu: object) -> None:
    single = dataclasses.replace(LLAMA, dtype="float32")
    grouped = dataclasses.replace(GROUPED, dtype="float32")

    assert choose("auto", single, gpu) == "efficient"
    assert choose("auto", grouped, gpu) == "math"


@pytest.mark.parametrize(
    ("head_dim", "on_a100", "on_l4"),
    [(192, "flash", "flash"), (224, "flash", "efficient"), (256, "flash", "flash")],
)
def test_the_flash_backward_of_some_heads_does_not_fit_small_chips(
    head_dim: int, on_a100: str, on_l4: str
) -> None:
    assert choose("auto", heads(head_dim), A100) == on_a100
    assert choose("auto", heads(head_dim), L4) == on_l4
    assert choose("auto", heads(head_dim, trains=False), L4) == "flash"


def test_heads_of_256_with_dropout_do_not_fit_small_chips() -> None:
    dropping = heads(256, dropout=0.1)

    assert choose("auto", dropping, A100) == "flash"
    assert choose("auto", dropping, RTX_3060) == "efficient"


def test_flash_takes_heads_up_to_256_and_of_one_size() -> None:
    assert choose("auto", heads(512), A100) == "efficient"
    assert choose("auto", heads(192, 128), A100) == "efficient"


def test_causal_flash_needs_as_many_keys_as_queries() -> None:
    longer = dataclasses.replace(LLAMA, key=(2, 32, 520, 128), value=(2, 32, 520, 128))

    assert choose("auto", longer, A100) == "efficient"
    assert choose("auto", dataclasses.replace(longer, causal=False), A100) == "flash"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kernels"),
    [
        (100, "float16", ("math", "math", "efficient")),
        (100, "float32", ("efficient", "efficient", "efficient")),
        (101, "float32", ("math", "efficient", "efficient")),
        (104, "float16", ("efficient", "efficient", "efficient")),
    ],
)
def test_rows_of_the_efficient_kernel_begin_where_tensor_cores_can_read(
    head_dim: int, dtype: str, kernels: tuple[str, str, str]
) -> None:
    """16 bytes from 8.0; half precision alone on 7.x; nothing on Pascal."""
    shapes = heads(head_dim, dtype=dtype, masked=True, causal=False)

    assert tuple(choose("auto", shapes, g) for g in (A100, V100, P100)) == kernels


def test_rows_that_do_not_lie_together_are_left_to_math() -> None:
    apart = dataclasses.replace(LLAMA, dense_rows=False)

    assert choose("auto", apart, A100) == "math"
    assert choose("auto", apart, H100) == "math"


@pytest.mark.parametrize(
    ("shapes", "kernel"),
    [
        (heads(256), "flash"),
        (heads(192, 128), "efficient"),
        (heads(100), "flash"),
        (heads(128, dropout=0.125), "cudnn"),
        (heads(128, dropout=0.1), "flash"),
    ],
)
def test_what_cudnn_refuses_goes_to_the_next_kernel_on_hopper(
    shapes: Shapes, kernel: str
) -> None:
    assert choose("auto", shapes, H100) == kernel


def test_latent_attention_goes_to_cudnn_on_data_centre_blackwell() -> None:
    assert choose("auto", heads(192, 128), B200) == "cudnn"


@pytest.mark.parametrize(
    ("kernel", "shapes", "gpu", "reason"),
    [
        ("flash", LLAMA, T4, "needs capability 8.0"),
        ("flash", MASKED, A100, "takes no mask"),
        ("flash", dataclasses.replace(LLAMA, dtype="float32"), A100, "half precision"),
        ("flash", heads(224), L4, "does not fit"),
        ("efficient", GROUPED, A100, "no grouped heads"),
        ("efficient", heads(100), A100, "multiples of 8"),
        ("efficient", dataclasses.replace(LLAMA, dtype="bfloat16"), T4, "needs 8.0"),
        ("cudnn", LLAMA, T4, "needs capability 8.0"),
        ("cudnn", heads(256), H100, "up to 128"),
        ("cudnn", heads(128, dropout=0.1), H100, "sixteenths"),
    ],
)
def test_a_pinned_kernel_that_cannot_run_is_refused(
    kernel: str, shapes: Shapes, gpu: object, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        choose(kernel, shapes, gpu)

    assert caught.value.field == "attention"
    assert caught.value.value == kernel


@pytest.mark.parametrize("kernel", ["math", "flash", "efficient", "cudnn"])
def test_a_pinned_kernel_that_can_run_runs(kernel: str) -> None:
    assert choose(kernel, LLAMA, A100) == kernel


@pytest.mark.parametrize("gpu", [T4, A100, H100])
def test_fewer_heads_of_keys_without_enable_gqa_are_for_math_alone(gpu: Gpu) -> None:
    """Falcon's one head of keys, which took score matrices on an H100."""
    falcon = dataclasses.replace(
        LLAMA, query=(2, 71, 512, 64), key=(2, 1, 512, 64), value=(2, 1, 512, 64)
    )

    assert choose("auto", falcon, gpu) == "math"
    with pytest.raises(InputError, match="as many heads of keys"):
        choose("flash", falcon, gpu)
