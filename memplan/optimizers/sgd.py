"""SGD without momentum: no state (torch.optim.sgd)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._sgd import Sgd


class Plain(Sgd):
    """SGD without momentum."""

    summary: ClassVar[str] = "torch's SGD without momentum"
    momentum: ClassVar[float] = 0.0


PART = Plain()
