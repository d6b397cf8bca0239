"""HQQ's layers: what they store and keep, against HQQ itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_training_methods import keys_of, logits_of, train
from test_training_step import loss_of
from tiny_models import CONFIGS, CPU, adapted, architecture, built, loop_of, tiny_recipe
from torch import nn

from memplan import checks, methods, quantizations, simulator
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.profiler.cpu_meter import StorageTracker
from memplan.recipe import Recipe
from memplan.simulator.cpu import simulate_on_cpu
from memplan.simulator.operators import rule_of
from memplan.simulator.operators.plain import PLAIN
from memplan.training import model as training_model
from memplan.training.life import merge

quantize = pytest.importorskip("hqq.core.quantize")

WIDTHS = (8, 4, 3, 2, 1)
HALF = {"compute_dtype": "bfloat16"}


def theirs(bits: int, weights: torch.Tensor) -> Any:
    """The layer as HQQ makes it."""
    linear = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight.data = weights.clone()
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    return quantize.HQQLinear(
        linear, config, compute_dtype=torch.bfloat16, device="cpu"
    )


def ours(bits: int, shape: tuple[int, int]) -> Any:
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    scheme = quantizations.find(f"hqq-{bits}bit")
    return scheme.quantized(linear, Recipe(quantization=f"hqq-{bits}bit", **HALF))


def sizes_of(layer: Any) -> list[int]:
    return [layer.W_q.nbytes, layer.meta["scale"].nbytes, layer.meta["zero"].nbytes]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (40, 512)])
def test_layers_store_what_the_scheme_says(bits: int, shape: tuple[int, int]) -> None:
    scheme = quantizations.find(f"hqq-{bits}bit")
    made = theirs(bits, torch.randn(shape))

    said = list(scheme.stored_bytes(shape[0] * shape[1], shape[0]))

    assert sizes_of(made) == said
    assert sizes_of(ours(bits, shape)) == said
    assert ours(bits, shape).W_q.shape == made.W_q.shape
    assert ours(bits, shape).meta.keys() <= made.meta.keys() | {"compute_dtype"}


@pytest.mark.parametrize(
    ("bits", "stored"), [(8, 8.5), (4, 4.5), (3, 3.7), (2, 2.5), (1, 1.5)]
)
def test_bits_a_weight(bits: int, stored: float) -> None:
    """A scale and a zero point of 16 bits per 64 weights add half a bit."""
    num_weights = 4096 * 11008

    num_bytes = sum(
        quantizations.find(f"hqq-{bits}bit").stored_bytes(num_weights, 11008)
    )

    assert 8 * num_bytes / num_weights == pytest.approx(stored, abs=0.001)


@pytest.mark.parametrize("bits", WIDTHS)
def test_filled_layers_are_hqq_s(bits: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(64, 128)
    made, layer = theirs(bits, weights), ours(bits, (64, 128))

    quantizations.find(f"hqq-{bits}bit").fill(layer, weights.clone())

    assert torch.equal(layer.dequantize(), made.dequantize())


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_frozen_layer_keeps_its_input_alone(bits: int) -> None:
    layer = theirs(bits, torch.randn(64, 128))
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)

    assert quantizations.find(f"hqq-{bits}bit").keeps_input
    assert kept == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_loss_falls(bits: int) -> None:
    checkpointing = "full" if bits % 2 else "none"
    keys = keys_of("lora", quantization=f"hqq-{bits}bit", checkpointing=checkpointing)
    recipe = tiny_recipe(**keys)
    before = loss_of("llama", adapted("llama", **keys), recipe)

    assert loss_of("llama", train("llama", keys), recipe) < before - 0.1


@pytest.mark.parametrize("bits", WIDTHS)
def test_saved_adapters_load_with_equal_outputs(bits: int, tmp_path: Path) -> None:
    keys = keys_of("lora", quantization=f"hqq-{bits}bit")
    recipe, model = tiny_recipe(**keys), train("llama", keys, 0.1)
    trained = logits_of("llama", model, recipe)
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    base = built("llama", **keys)
    training_model.prepare(base, recipe)
    untrained = logits_of("llama", base, recipe)

    loaded = methods.find("lora").load(base, str(tmp_path))

    assert torch.equal(logits_of("llama", loaded, recipe), trained)
    assert not torch.allclose(trained, untrained, atol=1e-2)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_bytes_of_a_real_step_are_the_simulated_ones(
    bits: int, checkpointing: str
) -> None:
    """Of tensors on the CPU, by the profiler's tracker."""
    keys = keys_of("lora", quantization=f"hqq-{bits}bit", checkpointing=checkpointing)
    recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
    loop = loop_of("llama", model, **keys)
    tracker = StorageTracker("cpu")
    with tracker:
        tracker.see([*model.parameters(), *model.buffers()])
        loop.run_step(1, 1)
        tracker.reset()
        loop.run_step(2, 1)

    simulated = simulate_on_cpu(architecture("llama"), recipe)

    peak = max(m.allocated_bytes for m in simulated.moments if m.label[0] == "2")
    assert tracker.peak_bytes == pytest.approx(peak, rel=0.005)


@pytest.mark.parametrize("quantization", ["hqq-4bit", "nf4-icq"])
def test_what_transformers_does_not_load_a_checkpoint_to_is_refused(
    quantization: str, tmp_path: Path
) -> None:
    """It would leave the weights as they are, or calibrate nothing."""
    config = transformers.AutoConfig.for_model("llama", **CONFIGS["llama"])
    saved = transformers.AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path)
    recipe = tiny_recipe(quantization=quantization)

    with pytest.raises(InputError, match=f"quantization: '{quantization}' is nothing"):
        training_model.load(architecture("llama"), recipe, str(tmp_path), CPU)


def test_transformers_itself_refuses_it(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **CONFIGS["llama"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            device_map={"": CPU},
            quantization_config=transformers.HqqConfig(nbits=4, group_size=64),
        )


def test_variants_of_lora_train_on_it() -> None:
    keys = keys_of("q-bara", quantization="hqq-4bit")
    recipe = tiny_recipe(**keys)
    before = loss_of("llama", adapted("llama", **keys), recipe)

    assert loss_of("llama", train("llama", keys), recipe) < before - 0.1


@pytest.mark.parametrize("bits", WIDTHS)
def test_it_is_simulated(bits: int) -> None:
    """The load holds what is stored; every operator of a step is known."""
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    scheme = quantizations.find(f"hqq-{bits}bit")
    recipe = Recipe(quantization=f"hqq-{bits}bit", sequence_length=64)
    traced = simulator.trace(llama, recipe, find_gpu("A100 80GB"))

    footprint = simulator.simulate(llama, recipe)

    unknown = [op for op in traced.operators if op.name() not in PLAIN]
    assert [op.name() for op in unknown if rule_of(op) is None] == []
    load = next(m for m in footprint.moments if m.label == "load")
    stored = sum(
        sum(scheme.stored_bytes(linear.num_weights, linear.out_features))
        for _, linear in llama.all_linears()
        if linear.kind != "head"
    )
    dense = 2 * (2 * 32000 * 2048 + 45 * 2048)
    assert load.end_allocated_bytes == pytest.approx(stored + dense, rel=0.001)


def test_what_cannot_carry_it_is_refused() -> None:
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    for method in ("adalora", "vera", "dora"):
        with pytest.raises(InputError, match="quantization: 'hqq-4bit'"):
            checks.check(llama, Recipe(method=method, quantization="hqq-4bit"))


def test_groups_that_do_not_fill_an_integer_are_refused() -> None:
    with pytest.raises(InputError, match="packs 8 groups of 64 weights"):
        ours(1, (3, 64))


def test_it_does_not_merge() -> None:
    keys = keys_of("lora", quantization="hqq-4bit")

    with pytest.raises(InputError, match="not simulated"):
        merge(adapted("llama", **keys))
