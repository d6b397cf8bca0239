"""ReLoRA: LoRA that is merged and begun anew every so many steps (Lialin et al., 2024).

W += s B A, A random again and B zero, and the optimizer's moments pruned. Between
restarts it is LoRA; a restart is a moment of its own. Source: Guitaricet/relora,
relora.py (`merge_and_reinit`) and training_utils.py (`optimizer_reset`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memplan.fields import Choice, Kind, Number
from memplan.methods import options_at
from memplan.methods.lora import LowRank, apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn

    from memplan.recipe import Recipe


class Relora(LowRank):
    """Low-rank adapters that restart."""

    summary: ClassVar[str] = "LoRA that is merged and begun anew now and then"
    options: ClassVar[Mapping[str, Kind]] = {
        "reset": Choice(("zero", "random", "magnitude")),
        "reset_share": Number(0, below=1),
    }
    defaults: ClassVar[Mapping[str, Any]] = {"reset": "zero", "reset_share": 0.999}

    keeps_base: ClassVar[bool] = False

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        return (
            "A restart changes the frozen weights, which a checkpoint of adapters does "
            "not hold: save the whole model.",
        )

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        return apply_lora(model, recipe, targets)

    def milestone(self, recipe: Recipe) -> str | None:
        return "restart"

    def reach_milestone(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer
    ) -> None:
        """Merges into the frozen weights, begins anew, and resets the moments."""
        import torch
        from peft.tuners.lora import LoraLayer

        model.merge_adapter()  # type: ignore[operator]
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(module.merged_adapters.pop(), True)
        options = options_at(recipe, "")
        with torch.no_grad():
            for state in optimizer.state.values():
                for name, tensor in state.items():
                    if isinstance(tensor, torch.Tensor) and name != "step":
                        _reset(tensor, options["reset"], options["reset_share"])


def _reset(moment: Tensor, how: str, share: float) -> None:
    """Zeroes a share of a moment's numbers; all of them, and of codes, for `zero`."""
    import torch

    if how == "zero" or not moment.is_floating_point():
        moment.zero_()
    elif how == "random":
        moment.mul_(torch.rand_like(moment) > share)
    else:
        size = moment.abs()
        rank = max(1, int(share * size.numel()))
        moment.mul_(size > size.flatten().kthvalue(rank).values)


PART = Relora()
