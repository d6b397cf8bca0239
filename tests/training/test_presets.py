"""What the installed Trainer and SFTTrainer really do, beside what the presets say.

Both run one step of a small model on the CPU, from rows of tokens that are in memory.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from tiny_models import CPU, adapted, architecture, tiny_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.inspector import build_config
from memplan.model_source import ModelSource
from memplan.recipe import Recipe, presets
from memplan.training.model import target_modules
from memplan.training.step import Loop

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
trl = pytest.importorskip("trl")

TOKENS = 16
VOCABULARY = 128
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Made:
    """An operator, what it made, and what was alive afterwards."""

    operator: str
    shapes: tuple[Any, ...]
    live_bytes: int


class Operators(TorchDispatchMode):
    """Notes each operator that makes a tensor of more than one number."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Made] = []
        self._live_bytes = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for given in tensors_of((args, kwargs)):
            self._watch(given.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        made = tensors_of(result)
        for tensor in made:
            self._watch(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        if any(tensor.numel() > 1 for tensor in made) and "detach" not in str(func):
            shapes = tuple((tuple(one.shape), one.dtype) for one in made)
            self.log.append(Made(str(func), shapes, self._live_bytes))
        return result

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Counts the bytes of a storage that is new for as long as it lives."""
        key = storage._cdata
        if key in self._storages:
            return

        def died(reference: Any) -> None:
            self._live_bytes -= num_bytes
            del self._storages[key]

        self._live_bytes += num_bytes
        self._storages[key] = weakref.ref(storage, died)


def tensors_of(values: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [value for value in leaves if isinstance(value, torch.Tensor)]


@dataclass
class Seen:
    """What was seen of a loop in its first step."""

    operators: list[Made] = field(default_factory=list)
    """From the embedding on: batches come about in different ways."""
    autocast_in_forward: bool | None = None
    autocast_in_backward: bool | None = None
    output: Any = None
    """The class of the model's output, and what it holds."""
    output_lives_in_backward: bool | None = None
    precisions: dict[str, set[torch.dtype]] = field(default_factory=dict)
    """Of adapters (or whatever is trained) and of norms."""
    clipped_at: float | None = None
    checkpointing: dict[str, Any] | None = None
    """What blocks are checkpointed with, if they are."""


def watch(model: Any, seen: Seen) -> None:
    """Looks on from within the model's forward and backward."""
    outputs: list[weakref.ref[torch.Tensor]] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        seen.autocast_in_forward = torch.is_autocast_enabled("cpu")

    def after_forward(module: nn.Module, args: Any, output: Any) -> None:
        seen.output = {name: value is not None for name, value in output.items()}
        largest = max((v for v in output.values() if _is_tensor(v)), key=torch.numel)
        outputs.append(weakref.ref(largest))

    def in_backward(gradient: torch.Tensor) -> None:
        seen.autocast_in_backward = torch.is_autocast_enabled("cpu")
        seen.output_lives_in_backward = outputs[0]() is not None

    # Accelerate's autocast is within the model's own forward, so within its hooks.
    model.get_input_embeddings().register_forward_pre_hook(before_forward)
    model.register_forward_hook(after_forward)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].register_hook(in_backward)
    seen.precisions = {
        "adapters": {parameter.dtype for parameter in trained},
        "norms": {p.dtype for n, p in model.named_parameters() if "norm" in n},
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def from_embedding(log: list[Made]) -> list[Made]:
    names = [made.operator for made in log]
    return log[names.index("aten.embedding.default") :]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    made = architecture("llama")
    source = ModelSource(name=made.name, origin="file", config=dict(made.config))
    model = transformers.AutoModelForCausalLM.from_config(build_config(source))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("transformers", "trl", "bitsandbytes"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield


def loaded(checkpoint: Path, recipe: Recipe) -> nn.Module:
    kwargs: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype)}
    if recipe.quantization == "nf4":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map={"": CPU}, **kwargs
    )
    return model


def lora_config() -> peft.LoraConfig:
    recipe = tiny_recipe()
    return peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(target_modules(architecture("llama"), recipe)),
        task_type="CAUSAL_LM",
    )


def word_tokenizer() -> Any:
    words = {f"w{index}": index for index in range(VOCABULARY - 2)}
    words |= {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel(words, unk_token="w0")
        ),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def rows() -> Any:
    row = list(range(TOKENS))
    return datasets.Dataset.from_list(
        [{"input_ids": row, "labels": row, "attention_mask": [1] * TOKENS}] * 4
    )


def arguments(trainer: str, folder: Path, **keys: Any) -> Any:
    classes = {"transformers": transformers.TrainingArguments, "trl": trl.SFTConfig}
    return classes[trainer](
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **keys,
    )


def real_trainer(
    checkpoint: Path, folder: Path, recipe: Recipe, **keys: Any
) -> transformers.Trainer:
    model = loaded(checkpoint, recipe)
    args = arguments(recipe.trainer, folder, **keys)
    if recipe.trainer == "trl":
        return trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows(),
            processing_class=word_tokenizer(),
            peft_config=lora_config(),
        )
    if recipe.method == "lora":
        model = peft.get_peft_model(model, lora_config())
    return transformers.Trainer(model=model, args=args, train_dataset=rows())


def see_real(made: transformers.Trainer) -> Seen:
    """One step of a trainer of the installed libraries."""
    seen = Seen()
    watch(made.model, seen)
    training_step = made.training_step
    clip = torch.nn.utils.clip_grad_norm_

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        with Operators() as operators:
            loss = training_step(*args, **kwargs)
        seen.operators = from_embedding(operators.log)
        return loss

    def noted_clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        seen.clipped_at = max_norm
        return clip(parameters, max_norm, *args, **kwargs)

    made.training_step = noted_step
    with mock.patch("torch.nn.utils.clip_grad_norm_", noted_clip):
        made.train()
    seen.checkpointing = checkpointing_of(made.model)
    return seen


def checkpointing_of(model: Any) -> dict[str, Any] | None:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    block = base.get_submodule("model.layers.0")
    if not block.gradient_checkpointing:
        return None
    keywords: dict[str, Any] = block._gradient_checkpointing_func.keywords
    return keywords


def see_simulated(**keys: Any) -> Seen:
    """One step of the loop that stands for it."""
    seen, operators = Seen(), Operators()
    model = adapted("llama", **keys)
    watch(model, seen)

    @contextlib.contextmanager
    def phase(label: str) -> Iterator[None]:
        if label.endswith(("forward", "backward")):
            with operators:
                yield
        else:
            yield

    Loop(model, tiny_recipe(**keys), VOCABULARY, phase).run_step(1, 1)
    seen.operators = from_embedding(operators.log)
    seen.clipped_at = tiny_recipe(**keys).max_grad_norm
    seen.checkpointing = checkpointing_of(model)
    return seen


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trainer": ({}, {"trainer": "transformers"}),
    "trainer-bf16": (
        {"bf16": True},
        {"trainer": "transformers", "autocast": "bfloat16"},
    ),
    "trainer-bf16-nf4-checkpointing": (
        {"bf16": True, "gradient_checkpointing": True},
        {
            "trainer": "transformers",
            "autocast": "bfloat16",
            "quantization": "nf4",
            "kbit_prepare": False,
            "checkpointing": "full",
        },
    ),
    "trainer-bf16-full": (
        {"bf16": True},
        {
            "trainer": "transformers",
            "autocast": "bfloat16",
            "method": "full",
            "dtype": "float32",
        },
    ),
    "sft": ({}, {"trainer": "trl", "checkpointing": "full"}),
    "sft-single": (
        {"gradient_checkpointing": False},
        {"trainer": "trl", "dtype": "float32"},
    ),
    "sft-nf4": (
        {"gradient_checkpointing": False},
        {"trainer": "trl", "quantization": "nf4"},
    ),
}
"""What the real trainer is told, and the recipe of the same run."""


@dataclass(frozen=True)
class Pair:
    recipe: dict[str, Any]
    real: Seen
    simulated: Seen

    @property
    def preset(self) -> dict[str, Any]:
        quantization = self.recipe.get("quantization", "none")
        return presets(self.recipe["trainer"], quantization)


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    keys, recipe = CASES[request.param]
    folder = tmp_path_factory.mktemp("out")
    made = real_trainer(checkpoint, folder, tiny_recipe(**recipe), **keys)
    return Pair(recipe, see_real(made), see_simulated(**recipe))


def test_the_same_operators_run_in_the_same_order(pair: Pair) -> None:
    """All that make more than one number, with the shapes and precisions they make."""
    real, simulated = (
        [(made.operator, made.shapes) for made in seen.operators]
        for seen in (pair.real, pair.simulated)
    )
    assert len(real) > 300
    assert simulated == real


def test_the_same_bytes_are_alive_after_each_operator(pair: Pair) -> None:
    """But for the loss as a single number, which the trainers divide in other places.

    Batches, which the trainers make before the step, are left out on both sides.
    """
    real, simulated = (
        [made.live_bytes - seen.operators[0].live_bytes for made in seen.operators]
        for seen in (pair.real, pair.simulated)
    )
    assert max(real) > 100_000
    apart = [abs(a - b) for a, b in zip(real, simulated, strict=True)]
    assert max(apart) <= 2 * FLOAT_BYTES


def test_outputs_are_dropped_before_backward(pair: Pair) -> None:
    assert pair.real.output_lives_in_backward is False
    assert pair.simulated.output_lives_in_backward is False
    assert pair.preset["keep_outputs"] == "none"


def test_autocast_covers_the_forward_alone(pair: Pair) -> None:
    asked = pair.recipe.get("autocast", pair.preset["autocast"])

    for seen in (pair.real, pair.simulated):
        assert seen.autocast_in_forward is (asked != "none")
        assert seen.autocast_in_backward is False


def test_adapters_and_norms_are_in_the_same_precision(pair: Pair) -> None:
    """SFTTrainer prepares nothing for k-bit training, so norms stay as loaded."""
    adapters = getattr(torch, pair.preset["adapter_dtype"])
    loaded_as = getattr(torch, pair.recipe.get("dtype", "bfloat16"))

    assert pair.real.precisions == {"adapters": {adapters}, "norms": {loaded_as}}
    assert pair.simulated.precisions == pair.real.precisions


def test_gradients_are_clipped_at_one(pair: Pair) -> None:
    assert pair.real.clipped_at == pair.preset["max_grad_norm"] == 1.0
    assert pair.simulated.clipped_at == pair.real.clipped_at


def test_logits_are_in_the_output_of_the_full_loss_alone(pair: Pair) -> None:
    chunked = pair.preset["loss"] == "chunked"

    for seen in (pair.real, pair.simulated):
        assert seen.output.get("logits", False) is not chunked
        assert seen.output.get("log_probs", False) is chunked


def test_checkpointing_is_not_reentrant_unless_asked(pair: Pair) -> None:
    asked = pair.recipe.get("checkpointing") == "full"

    assert pair.real.checkpointing == ({"use_reentrant": False} if asked else None)
    assert pair.simulated.checkpointing == pair.real.checkpointing


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_defaults_of_the_arguments(trainer: str, tmp_path: Path) -> None:
    args = arguments(trainer, tmp_path)
    preset = presets(trainer, "none")

    assert args.max_grad_norm == preset["max_grad_norm"]
    assert args.bf16 is (preset["autocast"] == "bfloat16")
    assert args.fp16 is False
    assert args.label_smoothing_factor == 0
    assert args.use_cache is False


def test_sft_trainer_alone_checkpoints_unless_told_otherwise(tmp_path: Path) -> None:
    """Neither preset says so: `checkpointing` is the recipe's own key."""
    told = {
        trainer: arguments(trainer, tmp_path).gradient_checkpointing
        for trainer in ("transformers", "trl")
    }

    assert {bool(told["transformers"]), bool(told["trl"])} == {False, True}
    assert told["trl"]


def test_sft_trainer_refuses_an_adapter_on_the_head(
    checkpoint: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")

    with pytest.raises(ValueError, match="lm_head"):
        trl.SFTTrainer(
            model=loaded(checkpoint, tiny_recipe()),
            args=arguments("trl", tmp_path),
            train_dataset=rows(),
            processing_class=word_tokenizer(),
            peft_config=config,
        )


def test_trainer_refuses_a_quantised_model_without_adapters(
    checkpoint: Path, tmp_path: Path
) -> None:
    from memplan import methods
    from memplan.errors import InputError

    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(
            model=loaded(checkpoint, tiny_recipe(quantization="nf4")),
            args=arguments("transformers", tmp_path),
            train_dataset=rows(),
        )
    with pytest.raises(InputError, match="trains the weights"):
        methods.check(tiny_recipe(method="full", quantization="nf4"))
