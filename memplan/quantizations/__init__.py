"""Schemes in which frozen linear layers are stored, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from memplan import registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.gpu import Gpu
    from memplan.recipe import Recipe


class Quantization(ABC):
    """How a frozen linear layer is stored, and the module that computes with it."""

    summary: ClassVar[str]
    """One line for lists of schemes."""
    bits: ClassVar[int | None]
    """Bits of a stored weight without its state; None where weights stay as loaded."""
    loading_flag: ClassVar[str | None]
    """The attribute by which transformers and PEFT know such a model."""
    loads_checkpoints: ClassVar[bool] = True
    """Whether transformers' from_pretrained quantises a checkpoint to it."""
    kbit_casts: ClassVar[bool] = True
    """Whether PEFT's preparation casts what is not quantised to float32."""
    kbit_prepares: ClassVar[bool] = True
    """Whether PEFT's preparation can run on it at all."""
    lora_only: ClassVar[bool] = False
    """Whether of PEFT's tuners LoRA alone knows its layers."""
    keeps_input: ClassVar[bool] = False
    """Whether a frozen layer's product keeps its input for backward."""
    merge_problem: ClassVar[str | None] = None
    """Why adapters cannot be merged into it."""

    @abstractmethod
    def stored_bytes(self, num_weights: int, out_features: int) -> tuple[int, ...]:
        """Bytes of each tensor a linear layer is stored in, the weight's first.

        Empty where weights stay as loaded.
        """

    def check(self, recipe: Recipe, gpu: Gpu | None) -> None:  # noqa: B027
        """Raises InputError for a recipe or a card that it does not go with."""

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """Sentences on what a recipe with this scheme may not be thought to do."""
        return ()

    @abstractmethod
    def quantized(self, linear: nn.Module, recipe: Recipe) -> nn.Module:
        """The module that stands for a linear layer, its weight as `stored_bytes` says.

        The layer is on the meta device, and so is what comes back.
        """

    @abstractmethod
    def fill(self, module: nn.Module, values: torch.Tensor) -> None:
        """Gives what `quantized` made those weights, (o, i), quantised where they are.

        As from_pretrained does when it quantises a checkpoint.
        """


def features_of(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; a Conv1D holds its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def find(name: str) -> Quantization:
    """The scheme of that name; raises UnknownNameError."""
    scheme: Quantization = registry.load("quantizations", name, "quantization")
    return scheme
