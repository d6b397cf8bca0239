"""Tensors that are made of others, as quantised weights may be.

Such a tensor has no memory of its own, though it says how large its storage would be;
operators on it are written in terms of the tensors that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with memory that a tensor is made of: itself, as a rule."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def any_wraps(types: Iterable[type]) -> bool:
    """Whether any of the types that an operator is called with is made of others."""
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)
