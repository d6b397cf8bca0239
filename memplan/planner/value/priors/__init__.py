"""Named opinions on what a rank is worth where nothing is measured, one file each.

The loss of rank r at a module is weight / (1 + r / KNEE_RANK): the whole weight without
an adapter, half of it at the knee, and little left to gain beyond.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from memplan import registry
from memplan.architecture import Linear

KNEE_RANK = 8
"""The rank at which half of an adapter's worth is gained. A choice: small fine-tunes
level off between ranks of 8 and 16, and no published measurement fixes it."""

_FOLDER = "planner.value.priors"


class Prior(ABC):
    """An opinion on which modules deserve their rank."""

    summary: ClassVar[str]
    """One line for lists of priors."""
    evidence: ClassVar[tuple[str, ...]]
    """What the opinion stands on, and what speaks against it."""

    @abstractmethod
    def weight(self, linear: Linear) -> float:
        """What a fully adapted layer is worth beside the others."""

    def loss(self, linear: Linear, rank: int) -> float:
        """What is lost at a rank."""
        return self.weight(linear) / (1 + rank / KNEE_RANK)


def names() -> tuple[str, ...]:
    """The names of the priors."""
    return registry.names(_FOLDER)


def find(name: str) -> Prior:
    """The prior of that name; raises UnknownNameError."""
    prior: Prior = registry.load(_FOLDER, name, "prior")
    return prior
