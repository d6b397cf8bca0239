"""Every way to the loss gives what the model's own gives, or says why it cannot."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from torch import nn

from memplan import losses
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.losses import _chunked_nll
from memplan.losses._head import IGNORED, Scaling, scaling_of
from memplan.losses._liger import chunk_tokens

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 70,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "phi": {},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
}
"""A plain head; a tied one; soft caps; a bias; logits multiplied; logits divided."""

TORCH_LOSSES = ("chunked", "chunked-logits", "chunked-nll")
KERNELS = ("liger", "cut")


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    """298 tokens to predict, 278 of them with a label: two chunks, one a short one."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 70, (2, 150))
    labels = tokens.clone()
    labels[0, 40:60] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def gradients(
    model: nn.Module, name: str, given: dict[str, torch.Tensor] | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = losses.find(name)
    value = loss.read(loss.run(model, given or batch()))
    value.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return value.item(), found


def assert_same(one: nn.Module, other: nn.Module, name: str, given: Any = None) -> None:
    expected, expected_gradients = gradients(one, "full", given)
    value, found = gradients(other, name, given)

    assert value == pytest.approx(expected, rel=1e-5)
    assert found.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TORCH_LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(name: str, family: str) -> None:
    model = tiny(family)
    prepared = copy.deepcopy(model)
    losses.find(name).prepare(prepared)

    assert_same(model, prepared, name)


def test_chunks_without_labels_are_left_out() -> None:
    model = tiny("llama")
    prepared = copy.deepcopy(model)
    losses.find("chunked-nll").prepare(prepared)
    given = batch()
    given["labels"][:, :140] = IGNORED
    scored = mock.Mock(wraps=_chunked_nll.checkpoint)

    with mock.patch.object(_chunked_nll, "checkpoint", scored):
        assert_same(model, prepared, "chunked-nll", given)

    assert scored.call_count == 1


def test_metrics_are_counted_as_trl_logs_them() -> None:
    model = tiny("llama")
    given = batch()
    logits = model(given["input_ids"]).logits[:, :-1]
    targets = given["labels"][:, 1:]
    valid = targets != IGNORED
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    losses.find("chunked-nll").prepare(model)

    outputs = model(**given)

    hits = (logits.argmax(-1) == targets) & valid
    assert outputs.num_correct.item() == hits.sum().item()
    assert outputs.entropy_sum.item() == pytest.approx(entropies[valid].sum().item())


@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_adapted_model_learns_the_same(name: str) -> None:
    model = tiny("llama")
    prepared = copy.deepcopy(model)
    losses.find(name).prepare(prepared)
    adapted = []
    for one in (model, prepared):
        torch.manual_seed(2)
        config = peft.LoraConfig(
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        adapted.append(peft.get_peft_model(one, config))

    assert_same(adapted[0], adapted[1], name)


@pytest.mark.parametrize("name", losses.registry.names("losses"))
def test_without_labels_a_model_still_gives_logits(name: str) -> None:
    model = tiny("llama")
    expected = model(batch()["input_ids"]).logits
    losses.find(name).prepare(model)

    torch.testing.assert_close(model(batch()["input_ids"]).logits, expected)


def test_what_a_loss_asks_or_leaves_out_is_noted() -> None:
    assert "loss alone is simulated" in losses.find("liger").notes(None)[0]
    assert "8.0, and Tesla T4 has 7.5" in losses.find("cut").notes(find_gpu("T4"))[0]
    assert losses.find("cut").notes(find_gpu("A100 80GB")) == ()
    assert losses.find("full").notes(find_gpu("T4")) == ()


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse_to_run_on_the_cpu(name: str) -> None:
    model = tiny("llama")
    losses.find(name).prepare(model)

    with pytest.raises(InputError, match=f"loss: '{name}' .*cannot run on cpu"):
        losses.find(name).run(model, batch())


def test_liger_leaves_evaluation_alone() -> None:
    model = tiny("llama").eval()
    expected = model(**batch())
    losses.find("liger").prepare(model)

    outputs = model(**batch())

    assert outputs.loss.item() == pytest.approx(expected.loss.item())
    torch.testing.assert_close(outputs.logits, expected.logits)
    with pytest.raises(InputError, match="cannot run on cpu"):
        model(**batch(), skip_logits=True)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("family", ["phi", "cohere", "granite"])
def test_kernels_refuse_biases_and_scaled_logits(name: str, family: str) -> None:
    with pytest.raises(InputError, match="without bias, whose logits are not scaled"):
        losses.find(name).prepare(tiny(family))


READING_WEIGHTS = ["chunked", "chunked-nll", *KERNELS]


@pytest.mark.parametrize("name", READING_WEIGHTS)
def test_head_that_is_more_than_a_weight_is_refused(name: str) -> None:
    import bitsandbytes as bnb

    model = tiny("llama")
    model.lm_head = bnb.nn.Linear4bit(32, 70, bias=False)

    with pytest.raises(InputError, match=r"its head is a Linear4bit.*use loss full"):
        losses.find(name).prepare(model)


@pytest.mark.parametrize("name", READING_WEIGHTS)
def test_adapter_beside_the_head_is_refused(name: str) -> None:
    model = tiny("llama")
    losses.find(name).prepare(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))

    with pytest.raises(InputError, match="without adapter"):
        losses.find(name).run(adapted, batch())


def test_chunks_of_logits_come_from_the_head_with_its_adapter() -> None:
    model = tiny("llama")
    prepared = copy.deepcopy(model)
    losses.find("chunked-logits").prepare(prepared)
    adapted = []
    for one in (model, prepared):
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        adapted.append(peft.get_peft_model(one, config))

    assert_same(adapted[0], adapted[1], "chunked-logits")


@pytest.mark.parametrize(
    ("family", "keys", "factor", "softcap"),
    [
        ("llama", {}, 1.0, None),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, None),
        ("granite", {"logits_scaling": 8.0}, 0.125, None),
        ("hyperclovax", {"logits_scaling": 8.0}, 8.0, None),
        ("minicpm3", {"hidden_size": 2560, "dim_model_base": 256}, 0.1, None),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, 0.5, None),
    ],
)
def test_what_a_family_does_to_its_logits(
    family: str, keys: dict[str, Any], factor: float, softcap: float | None
) -> None:
    config = transformers.AutoConfig.for_model(family, **keys)

    assert scaling_of(config) == Scaling(factor=factor, softcap=softcap)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        # ceil(128256 / 4096) = 32 parts of 8192 tokens are 256, a power of two.
        ((8192, 4096, 128_256), 256),
        # ceil(256000 / 2304) = 112 parts are 74 tokens: 128 is the next power.
        ((8192, 2304, 256_000), 128),
        # A vocabulary as small as the hidden size needs no parts.
        ((100, 4096, 4096), 100),
    ],
)
def test_liger_s_chunks(shape: tuple[int, int, int], tokens: int) -> None:
    assert chunk_tokens(*shape) == tokens
