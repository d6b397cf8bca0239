"""torch.optim.AdamW parameter after parameter: temporaries of one parameter's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from memplan.optimizers._adamw import Adamw


class AdamwLoop(Adamw):
    """AdamW over one tensor at a time."""

    summary: ClassVar[str] = "torch's AdamW, one parameter after the other"
    flags: ClassVar[dict[str, Any]] = {"foreach": False}

    def step_blocks(self, sizes: Sequence[int], dtype_bytes: int) -> Sequence[int]:
        """A square root, and its quotient (`_single_tensor_adam`)."""
        return 2 * (max(sizes, default=0),)


PART = AdamwLoop()
