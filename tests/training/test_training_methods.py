"""Every method, installed for real: what it trains, that it learns, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_step import loss_of, reached_by_gradients
from tiny_models import CPU, adapted, architecture, built, loop_of, tiny_recipe
from torch import nn

from memplan import methods, registry
from memplan.errors import InputError
from memplan.recipe import Recipe
from memplan.training import model as training_model
from memplan.training.batch import make_batch
from memplan.training.life import merge

NAMES = [name for name in registry.names("methods") if name != "full"]

OPTIONS: dict[str, dict[str, Any]] = {
    "qa-lora": {"group_size": 16},
    "peft": {"peft_type": "LORA", "init_lora_weights": "gaussian"},
}
"""What tiny shapes need, or a method cannot do without."""

RATES = {"vera": 0.3, "adalora": 0.03, "adaq-lora": 0.03}
"""Learning rates where 0.01 teaches little in a few steps."""

STEPS = 5


def keys_of(name: str, **keys: Any) -> dict[str, Any]:
    return {"method": name, "method_options": OPTIONS.get(name, {})} | keys


def train(family: str, keys: dict[str, Any], rate: float = 0.01) -> nn.Module:
    """The adapted model after a few steps on the same tokens."""
    model = adapted(family, **keys)
    loop = loop_of(family, model, **keys)
    factor = rate / loop.optimizer.param_groups[0]["lr"]
    for group in loop.optimizer.param_groups:
        group["lr"] *= factor
    for number in range(1, STEPS + 1):
        torch.manual_seed(1)
        loop.run_step(number, 1)
    return model


def logits_of(family: str, model: nn.Module, recipe: Recipe) -> torch.Tensor:
    torch.manual_seed(1)
    batch = make_batch(recipe, architecture(family).vocab_size, CPU)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(batch["input_ids"]).logits
    return logits


FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "phi")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_what_it_says(family: str, name: str) -> None:
    keys = keys_of(name)
    recipe, model = tiny_recipe(**keys), adapted(family, **keys)

    trained = [p.numel() for p in model.parameters() if p.requires_grad]

    assert sum(trained) == methods.trained_in_adapters(architecture(family), recipe)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_gradients_reach_everything(
    name: str, quantization: str, checkpointing: str
) -> None:
    keys = keys_of(name, quantization=quantization, checkpointing=checkpointing)
    recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
    reached = reached_by_gradients(model)
    before = loss_of("llama", model, recipe)
    loop = loop_of("llama", model, **keys)
    for group in loop.optimizer.param_groups:
        group["lr"] = RATES.get(name, 0.01)

    for number in range(1, STEPS + 1):
        torch.manual_seed(1)
        loop.run_step(number, 1)

    assert loss_of("llama", model, recipe) < before - 0.03
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", "none"), ("llama", "nf4-double"), ("gpt2", "none")],
)
@pytest.mark.parametrize("name", NAMES)
def test_saved_adapters_load_with_equal_outputs(
    name: str, quantization: str, family: str, tmp_path: Path
) -> None:
    single = {"dtype": "float32", "compute_dtype": "float32"}
    keys = keys_of(name, quantization=quantization, **single)
    recipe, model = tiny_recipe(**keys), train(family, keys, 0.1)
    trained = logits_of(family, model, recipe)
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    base = built(family, **keys)
    training_model.prepare(base, recipe)
    untrained = logits_of(family, base, recipe)

    loaded = methods.find(name).load(base, str(tmp_path))

    assert not torch.allclose(trained, untrained, atol=1e-3)
    # AdaLoRA loads without its masked triplets, which changes the order of sums.
    assert torch.allclose(logits_of(family, loaded, recipe), trained, atol=1e-5)


PATTERNS: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"rank_pattern": {"mlp.down_proj": 8, r"layers\.1\..*o_proj": 2}})
        for name in ("lora", "dora", "lora-fa", "ir-qlora", "houlsby", "q-bara")
    ),
    ("lora", {"alpha_pattern": {"q_proj": 3.0}}),
    ("q-bara", {"lambda_pattern": {"mlp.down_proj": 4}}),
    ("qa-lora", {"lambda_pattern": {"mlp.down_proj": 32}}),
    ("qa-hira", {"lambda_pattern": {"mlp.down_proj": 8}}),
    ("lora", {"trained_modules": ("lm_head",)}),
]


@pytest.mark.parametrize(("name", "uneven"), PATTERNS, ids=str)
def test_uneven_adapters_load_with_equal_outputs(
    name: str, uneven: dict[str, Any], tmp_path: Path
) -> None:
    single = {"dtype": "float32", "compute_dtype": "float32"}
    keys = keys_of(name, **single, **uneven)
    recipe, model = tiny_recipe(**keys), train("llama", keys, 0.1)
    trained = logits_of("llama", model, recipe)
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]

    loaded = methods.find(name).load(built("llama", **keys), str(tmp_path))

    assert torch.allclose(logits_of("llama", loaded, recipe), trained, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_in_every_family(name: str, family: str) -> None:
    """On NF4 with checkpointing, where most can go wrong."""
    keys = keys_of(name, quantization="nf4", checkpointing="full")
    recipe, model = tiny_recipe(**keys), adapted(family, **keys)
    before = loss_of(family, model, recipe)

    after = loss_of(family, train(family, keys, RATES.get(name, 0.01)), recipe)

    assert after < before - 0.03


MERGING = [n for n in NAMES if n not in ("houlsby",)]


@pytest.mark.parametrize("name", MERGING)
def test_adapters_merge_into_dense_weights(name: str) -> None:
    family = "gpt2" if name in ("q-bara", "ir-qlora") else "llama"
    keys = keys_of(name, dtype="float32")
    recipe, model = tiny_recipe(**keys), train(family, keys)
    trained = logits_of(family, model, recipe)

    merged = logits_of(family, merge(model), recipe)

    assert torch.allclose(merged, trained, atol=2e-4)


@pytest.mark.parametrize("name", ["qa-lora", "q-bara", "qa-hira", "ir-qlora"])
def test_what_a_quantised_base_has_no_place_for_does_not_merge(name: str) -> None:
    keys = keys_of(name, quantization="nf4")

    with pytest.raises(InputError, match=r"would be rounded again"):
        merge(adapted("llama", **keys))


def test_serial_adapters_never_merge() -> None:
    with pytest.raises(InputError, match="no linear function of its input"):
        merge(adapted("llama", **keys_of("houlsby")))
