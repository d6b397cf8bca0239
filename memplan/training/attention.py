"""How a pinned attention kernel is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def repeated_heads(attention: str) -> Iterator[None]:
    """Lets transformers repeat grouped heads for a kernel that takes none.

    Memory-efficient attention refuses fewer key than query heads, and transformers
    leaves the grouping to PyTorch wherever it may.
    """
    if attention != "efficient":
        yield
        return
    # A mock with a return value would hold on to the tensors that it is called with.
    with mock.patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", _never):
        yield


def _never(*args: Any, **kwargs: Any) -> bool:
    return False
