"""torch.optim.AdamW as CUDA runs it by default: over lists of tensors.

`_multi_tensor_adam` holds one extra list, the square roots of the second moments, of
the size of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from memplan.optimizers._adamw import Adamw


class AdamwForeach(Adamw):
    """AdamW over lists of tensors."""

    summary: ClassVar[str] = "torch's AdamW, its default on CUDA (foreach)"
    flags: ClassVar[dict[str, Any]] = {"foreach": True}

    def step_blocks(self, sizes: Sequence[int], dtype_bytes: int) -> Sequence[int]:
        """The square roots of all second moments at once."""
        return sizes


PART = AdamwForeach()
