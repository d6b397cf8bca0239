"""Attention before MLP, as Shen et al. (CMC 2025, 10.32604/cmc.2024.057491) found it.

Their Table 3 gives the accuracy of QLoRA at rank 64 on 0-shot commonsense tasks, and
with the rank of one kind of layer halved.
"""

from __future__ import annotations

from typing import ClassVar

from memplan.architecture import Linear
from memplan.planner.value.priors import Prior

ACCURACY = 62.0
ACCURACY_ATTENTION_HALVED = 61.2
ACCURACY_MLP_HALVED = 61.8
"""Percent, LLaMA-7B, Table 3."""

ATTENTION_LINEARS, MLP_LINEARS = 4, 3
"""Linear layers of each kind in a block of LLaMA."""

BALANCING_FACTOR = 2
"""The lambda of Q-BaRA that did best, followed by 1, whatever the layer (section 4)."""

MLP_FACTORS = (8, 8)
"""QA-HiRA's (lambda1, lambda2) that MLP layers tolerate; (4, 8) elsewhere (Table 4)."""


class AttentionSensitive(Prior):
    """An attention layer is worth three MLP layers, by the losses of one model."""

    summary: ClassVar[str] = "attention before MLP (Shen et al., 2025)"
    evidence: ClassVar[tuple[str, ...]] = (
        "LLaMA-7B lost 0.8 points with the attention's rank halved and 0.2 with the "
        "MLP's (Table 3): three to one, a layer. On LLaMA2-7B 0.4 were lost and 0.1 "
        "won, which gives no ratio.",
        "Averages of 3 runs without deviations; alpha stayed at 16, so that halving a "
        "rank doubled its scale; the parts do not add up to the halves by depth.",
        "memplan's own comparison at equal bytes, on a small model: worse than equal "
        "ranks by 0.0333 nats a byte, +- 0.0033 (reports/benchmark_ranks.md).",
        "Others find the opposite: PEFT's MetaMathQA runs, AdaLoRA, LoRA Without "
        "Regret.",
        "The same authors find lambda = 2 best for Q-BaRA, whatever the layer, and "
        "(8, 8) enough for MLP layers in QA-HiRA.",
    )

    def weight(self, linear: Linear) -> float:
        return attention_to_mlp() if linear.kind == "attention" else 1.0


def attention_to_mlp() -> float:
    """The worth of an attention layer beside an MLP layer: 3."""
    attention = (ACCURACY - ACCURACY_ATTENTION_HALVED) / ATTENTION_LINEARS
    mlp = (ACCURACY - ACCURACY_MLP_HALVED) / MLP_LINEARS
    return attention / mlp


PART = AttentionSensitive()
