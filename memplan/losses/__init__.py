"""Ways from the last hidden states to the loss, one file each.

Shapes: hidden states (B, T, H), labels (B, T), the head's weight (V, H). N tokens, at
most B (T - 1), have a label.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from memplan import registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memplan.gpu import Gpu


class Loss(ABC):
    """A way to the loss: what it does to a model, and how a loop reads it."""

    summary: ClassVar[str]
    """One line for lists of losses."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Gives a model, before it is adapted, the head that the loss needs.

        Raises InputError where it cannot stand in for the model's own.
        """

    def notes(self, gpu: Gpu | None) -> tuple[str, ...]:
        """Sentences on what the loss asks of a card, and on what it leaves out."""
        return ()

    def run(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's outputs for a batch with labels."""
        return model(**batch)

    def read(self, outputs: Any) -> Tensor:
        """The loss in the outputs, a scalar with its graph."""
        loss: Tensor = outputs["loss"]
        return loss


def find(name: str) -> Loss:
    """The loss of that name; raises UnknownNameError."""
    loss: Loss = registry.load("losses", name, "loss")
    return loss
