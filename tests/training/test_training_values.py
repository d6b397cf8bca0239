"""A model that was built without values gets them as its family has them at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import CONFIGS, architecture, built
from torch import nn

from memplan.inspector import build_config
from memplan.model_source import ModelSource

QUANTIZED = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_tensor_gets_storage_and_finite_values(
    family: str, quantization: str
) -> None:
    for name, tensor in named_tensors(built(family, quantization=quantization)).items():
        assert tensor.device.type == "cpu", name
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("family", CONFIGS)
def test_buffers_hold_what_transformers_computes(family: str) -> None:
    """Rotary frequencies and the like, which only an initialisation sets."""
    made = architecture(family)
    config = build_config(
        ModelSource(name=made.name, origin="file", config=dict(made.config))
    )
    real = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    buffers = dict(built(family).named_buffers())

    assert buffers.keys() == dict(real.named_buffers()).keys()
    for name, buffer in real.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_norms_start_at_one_and_weights_at_random() -> None:
    model = built("llama", dtype="float32")

    layer = model.get_submodule("model.layers.0")
    assert torch.all(layer.input_layernorm.weight == 1)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_weights_stay_one() -> None:
    model: Any = built("qwen2")

    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantised_weights_dequantise_to_random_ones(quantization: str) -> None:
    from peft.utils.integrations import dequantize_module_weight

    model = built("llama", quantization=quantization)

    weight = dequantize_module_weight(model.get_submodule("model.layers.1.mlp.up_proj"))
    assert weight.shape == (96, 64)
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_biases_beside_quantised_weights_are_zero(quantization: str) -> None:
    model = built("phi", quantization=quantization)

    assert not model.get_submodule("model.layers.0.mlp.fc1").bias.any()
