"""The loss that a loop reads, and what becomes of the outputs it is read from."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import CPU, adapted, architecture, built, tiny_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from memplan.errors import InputError
from memplan.recipe import Recipe
from memplan.training.batch import make_batch
from memplan.training.loss import prepare_loss, read_loss, run_forward
from memplan.training.model import trained_parameters

trl = pytest.importorskip("trl")


def batch_of(family: str, recipe: Recipe) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return make_batch(recipe, architecture(family).vocab_size, CPU)


@contextlib.contextmanager
def autocast(recipe: Recipe) -> Iterator[None]:
    if recipe.autocast == "none":
        yield
        return
    with torch.autocast("cpu", getattr(torch, recipe.autocast)):
        yield


def loss_of(model: nn.Module, family: str, recipe: Recipe) -> torch.Tensor:
    with autocast(recipe):
        outputs = run_forward(model, batch_of(family, recipe), recipe)
    return read_loss(outputs, recipe)[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_chunked_loss_is_the_full_one(family: str, method: str) -> None:
    """With soft caps, tied weights and heads of other names; gradients too."""
    keys = {"method": method, "dtype": "float32"}
    model = adapted(family, **keys)
    full, chunked = (tiny_recipe(loss=loss, **keys) for loss in ("full", "chunked"))

    expected = loss_of(model, family, full)
    expected_gradients = torch.autograd.grad(expected, trained_parameters(model))
    base: Any = model if method == "full" else model.get_base_model()
    prepare_loss(base, chunked)
    found = loss_of(model, family, chunked)

    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, trained_parameters(model))
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_chunked_loss_refuses_an_adapter_on_the_head() -> None:
    """It would read the weight and pass over the adapter, as SFTTrainer says."""
    keys = {"trainer": "trl", "targets": ("lm_head",)}
    model, recipe = adapted("llama", **keys), tiny_recipe(**keys)

    with pytest.raises(InputError, match=r"loss: 'chunked'.*without adapter"):
        run_forward(model, batch_of("llama", recipe), recipe)


def test_a_padded_batch_hides_a_quarter_of_its_first_sequence() -> None:
    mask = batch_of("llama", tiny_recipe(padded=True))["attention_mask"]

    assert mask.tolist() == [[0] * 4 + [1] * 12, [1] * 16]


@pytest.mark.parametrize("trainer", ["plain", "transformers", "trl"])
def test_labels_and_mask_are_those_of_the_trainer_s_collator(trainer: str) -> None:
    batch = batch_of("llama", tiny_recipe(trainer=trainer))

    by_collator = trainer != "plain"
    assert (batch["labels"] is not batch["input_ids"]) is by_collator
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert ("attention_mask" in batch) is by_collator
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


class Operators(TorchDispatchMode):
    """Notes each operator, and the shapes and precisions of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else (result,)
        tensors = (one for one in made if isinstance(one, torch.Tensor))
        self.log.append((func, *((tuple(one.shape), one.dtype) for one in tensors)))
        return result


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Accelerate keeps its precision for the process; it is free before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_outputs_are_converted_as_accelerate_does(
    accelerator: Accelerator, trainer: str, dtype: str
) -> None:
    """Operator for operator, from the tokens to the loss."""
    keys = {"trainer": trainer, "autocast": "bfloat16", "dtype": dtype}
    recipe, model = tiny_recipe(**keys), adapted("llama", **keys)
    batch = batch_of("llama", recipe)
    with Operators() as simulated, autocast(recipe):
        outputs = run_forward(model, batch, recipe)
    with simulated:
        outputs, loss = read_loss(outputs, recipe)

    prepared: Any = accelerator.prepare_model(model)
    with Operators() as real:
        kwargs = {"fused_lm_head": True} if trainer == "trl" else {}
        expected = prepared(**batch, **kwargs)

    assert simulated.log[: len(real.log)] == real.log
    assert type(outputs) is type(expected)
    precisions = {name: value.dtype for name, value in outputs.items()}
    assert precisions == {name: value.dtype for name, value in expected.items()}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize(
    ("trainer", "autocast_dtype", "converted"),
    [
        ("plain", "bfloat16", False),
        ("transformers", "none", False),
        ("transformers", "bfloat16", True),
    ],
)
def test_half_precision_logits_die_where_float32_ones_are_handed_on(
    trainer: str, autocast_dtype: str, converted: bool
) -> None:
    recipe = tiny_recipe(trainer=trainer, autocast=autocast_dtype, loss="full")
    logits = torch.ones(2, 16, 128, dtype=torch.bfloat16, requires_grad=True) * 1
    loss = logits.float().mean()
    outputs = CausalLMOutputWithPast(loss=loss, logits=logits)
    half = weakref.ref(logits)
    del logits

    outputs, read = read_loss(outputs, recipe)

    assert read is loss
    assert (half() is None) is converted
    assert outputs.logits.dtype == (torch.float32 if converted else torch.bfloat16)


def test_full_loss_leaves_the_model_s_forward_alone() -> None:
    model = built("llama")
    forward = model.forward

    prepare_loss(model, tiny_recipe())

    assert model.forward == forward
