"""Meta kernels with a memory give what the kernels themselves give."""

from __future__ import annotations

import pytest
import torch

from memplan.simulator.meta import MetaKernels

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, (meta(4, 1), meta(1, 8)), {}),
        (aten.mm.default, (meta(4, 8).t(), meta(4, 2)), {}),
        (aten._to_copy.default, (meta(4, 8),), {"dtype": torch.bfloat16}),
        (aten.native_layer_norm.default, (meta(4, 8), [8], None, None, 1e-5), {}),
        (aten.pow.Tensor_Scalar, (meta(4, 8, dtype=torch.int64), 2), {}),
        (aten.pow.Tensor_Scalar, (meta(4, 8, dtype=torch.int64), 2.0), {}),
        (aten.clone.default, (meta(4, 8).t(),), {}),
    ],
)
def test_the_second_time_equals_the_first(
    func: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    kernels = MetaKernels()
    first = kernels.run(func, args, kwargs)
    second = kernels.run(func, args, kwargs)
    expected = func(*args, **kwargs)  # type: ignore[operator]

    for one, other, real in zip(
        _flat(first), _flat(second), _flat(expected), strict=True
    ):
        assert other is not one
        assert (other.shape, other.stride(), other.dtype) == (
            real.shape,
            real.stride(),
            real.dtype,
        )
        assert other.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def test_equal_keys_of_other_types_are_told_apart() -> None:
    kernels = MetaKernels()
    values = meta(4, dtype=torch.int64)

    assert kernels.run(aten.mul.Tensor, (values, 2), {}).dtype == torch.int64
    assert kernels.run(aten.mul.Tensor, (values, 2.0), {}).dtype == torch.float32


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (meta(4, 8), [32])),
        (aten.t.default, (meta(4, 8),)),
        (aten._unsafe_view.default, (meta(4, 8), [32])),
        (aten.detach.default, (meta(4, 8),)),
    ],
)
def test_views_keep_their_storage(func: object, args: tuple[torch.Tensor, ...]) -> None:
    kernels = MetaKernels()
    for _ in range(2):
        result = kernels.run(func, args, {})
        assert result.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def test_in_place_operators_return_what_they_were_given() -> None:
    values = meta(4)
    assert MetaKernels().run(aten.add_.Tensor, (values, values), {}) is values


def _flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    assert isinstance(result, tuple | list)
    return [tensor for tensor in result if tensor is not None]
