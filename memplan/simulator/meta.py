"""Meta kernels with a memory: an operator that ran on such shapes need not run again.

Most meta kernels are Python decompositions that take a hundred microseconds, and a
model asks the same of them in every layer. What decides their result are shapes,
strides, precisions and plain arguments alone.
"""

from __future__ import annotations

from typing import Any

import torch

_ALIASING_IN_FACT = frozenset({"aten::_unsafe_view", "aten::lift_fresh"})
"""Operators that return their input's storage though their schema does not say so."""

_KEEPING_SHAPE = frozenset(
    {
        "aten::add_",
        "aten::addcdiv_",
        "aten::addcmul_",
        "aten::bernoulli_",
        "aten::clamp_",
        "aten::copy_",
        "aten::div_",
        "aten::fill_",
        "aten::lerp_",
        "aten::masked_fill_",
        "aten::mul_",
        "aten::neg_",
        "aten::normal_",
        "aten::sqrt_",
        "aten::sub_",
        "aten::uniform_",
        "aten::zero_",
    }
)
"""In-place operators that change nothing but values."""

_OF_LISTS = "aten::_foreach_"
"""Begins the names of operators over lists; those that end with `_` work in place."""

_MISSING = object()


class MetaKernels:
    """Runs operators on meta tensors, each new combination of arguments once."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._in_place: dict[Any, bool] = {}
        self._fresh: dict[Any, bool] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's result over meta tensors."""
        try:
            fresh = self._fresh[func]
        except KeyError:
            fresh = self._fresh[func] = _returns_fresh_tensors(func)
            self._in_place[func] = _changes_values_only(func)
        if self._in_place[func] and _is_meta(args[0]):
            return args[0] if func._schema.returns else None
        if not fresh:
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            known = self._results.get(key, _MISSING)
        except TypeError:
            return func(*args, **kwargs)
        if known is not _MISSING:
            return _build(known)
        result = func(*args, **kwargs)
        specification = _specify(result)
        if specification is not _MISSING:
            self._results[key] = specification
        return result


def _changes_values_only(func: Any) -> bool:
    """Whether an operator works in place, on tensors or lists, and keeps shapes."""
    name = func.name().partition(".")[0]
    of_lists = name.startswith(_OF_LISTS) and name.endswith("_")
    return name in _KEEPING_SHAPE or (of_lists and not func._schema.returns)


def _is_meta(changed: Any) -> bool:
    """Whether a tensor, or a list of them, which is on one device, is a meta tensor."""
    tensor = changed[0] if isinstance(changed, list) else changed
    return bool(tensor.device.type == "meta")


def _returns_fresh_tensors(func: Any) -> bool:
    """Whether an operator returns new tensors, and changes nothing it is given."""
    schema = func._schema
    if func.name().partition(".")[0] in _ALIASING_IN_FACT:
        return False
    return not any(
        value.alias_info is not None for value in (*schema.arguments, *schema.returns)
    )


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, list | tuple):
        return (type(value), *map(_key, value))
    # 1, 1.0 and True are equal as keys, but not as arguments.
    return (value, type(value))


def _specify(result: Any) -> Any:
    """What it takes to make such a result again; _MISSING where it cannot be."""
    if result is None:
        return None
    if isinstance(result, torch.Tensor):
        plain = type(result) is torch.Tensor and result.device.type == "meta"
        if not plain or result.storage_offset():
            return _MISSING
        return (result.shape, result.stride(), result.dtype)
    if isinstance(result, tuple | list):
        items = [_specify(item) for item in result]
        return _MISSING if _MISSING in items else items
    return _MISSING


def _build(specification: Any) -> Any:
    if specification is None:
        return None
    if isinstance(specification, list):
        return tuple(_build(item) for item in specification)
    shape, stride, dtype = specification
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
