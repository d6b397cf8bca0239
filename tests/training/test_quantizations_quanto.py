"""quanto's layers: what they store and keep, against quanto itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_training_methods import NAMES, RATES, keys_of, logits_of, train
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
from memplan.training.wrapped import plain_tensors

quanto = pytest.importorskip("optimum.quanto")

WIDTHS = (8, 4, 2)
SHAPES = [(64, 256), (96, 192), (48, 64), (64, 272)]
"""Groups of 128 and of 96; no groups, in a short row and in one that none divides."""


def theirs(bits: int, weights: torch.Tensor, dtype: torch.dtype) -> Any:
    """The layer as transformers makes it: `QLinear`, then `freeze`."""
    layer = quanto.QLinear(
        weights.shape[1],
        weights.shape[0],
        bias=False,
        dtype=dtype,
        weights=f"qint{bits}",
    )
    layer.weight.data = weights.to(dtype)
    layer.freeze()
    layer.weight.requires_grad = False
    return layer


def ours(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
    scheme = quantizations.find(f"quanto-int{bits}")
    return scheme.quantized(linear, Recipe(quantization=f"quanto-int{bits}"))


def sizes_of(layer: Any) -> list[int]:
    scalars = [layer.input_scale, layer.output_scale]
    return [t.nbytes for t in (*plain_tensors(layer.weight), *scalars)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_store_what_the_scheme_says(
    bits: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    made, built = theirs(bits, torch.randn(shape), dtype), ours(bits, shape, dtype)
    scheme = quantizations.find(f"quanto-int{bits}")

    said = list(scheme.stored_bytes(shape[0] * shape[1], shape[0]))

    assert sizes_of(built) == sizes_of(made)
    assert type(built.weight) is type(made.weight)
    if dtype == torch.bfloat16 or bits != 4:
        assert sizes_of(made) == said


@pytest.mark.parametrize(("bits", "stored"), [(8, 8.0), (4, 4.25), (2, 2.25)])
def test_bits_a_weight(bits: int, stored: float) -> None:
    """A scale and a shift of 16 bits per 128 weights add a quarter of a bit."""
    num_weights = 4096 * 11008
    scheme = quantizations.find(f"quanto-int{bits}")

    num_bytes = sum(scheme.stored_bytes(num_weights, 11008))

    assert 8 * num_bytes / num_weights == pytest.approx(stored, abs=0.005)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_filled_layers_are_quanto_s(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weights = torch.randn(shape)
    made = theirs(bits, weights, torch.bfloat16)
    layer = ours(bits, shape, torch.bfloat16)

    quantizations.find(f"quanto-int{bits}").fill(layer, weights.clone())

    assert torch.equal(layer.weight.dequantize(), made.weight.dequantize())


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_frozen_layer_keeps_its_input_alone(bits: int) -> None:
    layer = theirs(bits, torch.randn(64, 256), torch.bfloat16)
    x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)

    weight = {t.data_ptr() for t in plain_tensors(layer.weight)}
    held = {t.data_ptr() for tensor in kept for t in plain_tensors(tensor)}
    assert quantizations.find(f"quanto-int{bits}").keeps_input
    assert held - weight == {x.data_ptr()}


@pytest.mark.parametrize("bits", WIDTHS)
def test_saved_adapters_load_with_equal_outputs(bits: int, tmp_path: Path) -> None:
    keys = keys_of("lora", quantization=f"quanto-int{bits}")
    recipe, model = tiny_recipe(**keys), train("llama", keys, 0.1)
    trained = logits_of("llama", model, recipe)
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    base = built("llama", **keys)
    training_model.prepare(base, recipe)
    untrained = logits_of("llama", base, recipe)

    loaded = methods.find("lora").load(base, str(tmp_path))

    assert torch.equal(logits_of("llama", loaded, recipe), trained)
    assert not torch.allclose(trained, untrained, atol=1e-2)


REFUSED = [("dora", bits) for bits in WIDTHS] + [("adalora", 8), ("adaq-lora", 8)]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_under_every_method_that_it_carries(name: str) -> None:
    """Widths and checkpointing in turn."""
    index = NAMES.index(name)
    bits = 2 if name in ("adalora", "adaq-lora") else WIDTHS[index % 3]
    keys = keys_of(
        name,
        quantization=f"quanto-int{bits}",
        checkpointing=("none", "full")[index % 2],
    )
    recipe = tiny_recipe(**keys)
    if name in ("dora", "relora"):
        with pytest.raises(InputError, match="quanto-int"):
            checks.check(architecture("llama"), recipe)
        return
    before = loss_of("llama", adapted("llama", **keys), recipe)

    after = loss_of("llama", train("llama", keys, RATES.get(name, 0.01)), recipe)

    assert after < before - 0.1


@pytest.mark.parametrize(("name", "bits"), REFUSED)
def test_what_cannot_carry_it_is_refused_and_fails_indeed(name: str, bits: int) -> None:
    keys = keys_of(name, quantization=f"quanto-int{bits}")
    with pytest.raises(InputError, match=f"quantization: 'quanto-int{bits}'"):
        checks.check(architecture("llama"), tiny_recipe(**keys))

    with pytest.raises((ValueError, RuntimeError), match=r"dtype|view"):
        train("llama", keys)


def test_kernels_that_are_not_simulated_are_refused() -> None:
    llama = inspect("huggyllama/llama-7b")
    turing, ampere = find_gpu("T4"), find_gpu("A100 80GB")
    halves = [(turing, "bfloat16"), (ampere, "float16"), (None, "float16")]
    for gpu, dtype in halves:
        with pytest.raises(InputError, match="quanto takes another kernel"):
            checks.check(llama, Recipe(quantization="quanto-int4", dtype=dtype), gpu)
    checks.check(llama, Recipe(quantization="quanto-int4", dtype="float16"), turing)
    with pytest.raises(InputError, match="float32"):
        checks.check(llama, Recipe(quantization="quanto-int8", dtype="float32"))


@pytest.mark.parametrize("bits", WIDTHS)
def test_it_is_simulated(bits: int) -> None:
    """The load holds what is stored; every operator of a step is known."""
    llama = inspect("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    scheme = quantizations.find(f"quanto-int{bits}")
    recipe = Recipe(quantization=f"quanto-int{bits}", sequence_length=64)
    traced = simulator.trace(llama, recipe, find_gpu("A100 80GB"))

    footprint = simulate_on_cpu(llama, recipe)

    unknown = [op for op in traced.operators if op.name() not in PLAIN]
    assert [op.name() for op in unknown if rule_of(op) is None] == []
    load = next(m for m in footprint.moments if m.label == "load")
    stored = sum(
        sum(scheme.stored_bytes(linear.num_weights, linear.out_features))
        for _, linear in llama.all_linears()
        if linear.kind != "head"
    )
    dense = 2 * (2 * 32000 * 2048 + 45 * 2048)
    frequencies = load.end_allocated_bytes - stored - dense
    assert 0 <= frequencies < 1024


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_bytes_of_a_real_step_are_the_simulated_ones(
    bits: int, checkpointing: str
) -> None:
    """Of tensors on the CPU, by the profiler's tracker."""
    keys = keys_of("lora", quantization=f"quanto-int{bits}")
    keys |= {"checkpointing": checkpointing}
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


@pytest.mark.parametrize("bits", WIDTHS)
def test_transformers_quantises_a_checkpoint_to_the_same_layers(
    bits: int, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model("llama", **CONFIGS["llama"])
    saved = transformers.AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path)
    recipe = tiny_recipe(quantization=f"quanto-int{bits}")

    loaded = training_model.load(architecture("llama"), recipe, str(tmp_path), CPU)

    meant = built("llama", quantization=f"quanto-int{bits}")
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        theirs, ours = loaded.get_submodule(path), meant.get_submodule(path)
        assert type(theirs.weight) is type(ours.weight)
        assert sizes_of(theirs)[:-2] == sizes_of(ours)[:-2]
    assert type(loaded.get_submodule("lm_head")) is nn.Linear


def test_it_does_not_merge() -> None:
    keys = keys_of("lora", quantization="quanto-int4")

    with pytest.raises(InputError, match="cannot be done"):
        merge(adapted("llama", **keys))
