"""SGD with momentum: a buffer like the gradient (torch.optim.sgd)."""

from __future__ import annotations

from typing import ClassVar

from memplan.optimizers._sgd import Sgd


class WithMomentum(Sgd):
    """SGD with momentum."""

    summary: ClassVar[str] = "torch's SGD with momentum"
    momentum: ClassVar[float] = 0.9


PART = WithMomentum()
