"""Evaluation, generation, saving, merging and resuming, traced and on real tensors.

Everything runs in float32 with eager attention, where the CPU runs the operators that a
card would. What a trace says that a kernel takes for itself is left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from event_logs import events_of
from storage_meter import StorageMeter
from tiny_models import CPU, adapted, architecture, loop_of, tiny_recipe
from torch import nn
from transformers import Trainer, TrainingArguments

from memplan import optimizers, simulator
from memplan.generation import Generation
from memplan.gpu import find_gpu
from memplan.life import CARD, Evaluation, Life
from memplan.simulator.events import FREE
from memplan.training import life as training_life
from memplan.training.model import trained_parameters

VOCAB = 128
SEQUENCE = 16

SLACK_BYTES = 1024
"""What a few counters and the prompt itself take, which loops make at other times."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a trace says of a moment."""

    births: list[int]
    """Bytes of each tensor's storage that is made, in order."""
    peak_bytes: int
    """The most bytes that live at once of those that are made."""


def traced(family: str, life: Life, label: str, **keys: Any) -> Told:
    trace = simulator.trace(
        architecture(family), real(**keys), find_gpu("80GB"), life=life, whole=True
    )
    log = trace.log
    births: dict[int, int] = {}
    live = peak = 0
    for block, num_bytes in events_of(log, label):
        if block < 0 or log.categories[block] == "workspace" or not log.sizes[block]:
            continue
        if num_bytes == FREE:
            live -= births.get(block, 0)
        else:
            births[block] = num_bytes
            live += num_bytes
            peak = max(peak, live)
    return Told([*births.values()], peak)


def real(**keys: Any) -> Any:
    return tiny_recipe(**{"dtype": "float32", "attention": "eager"} | keys)


def model_of(family: str, **keys: Any) -> nn.Module:
    return adapted(family, **{"dtype": "float32", "attention": "eager"} | keys)


@pytest.mark.parametrize(
    ("family", "keeps_logits", "keys"),
    [
        ("llama", True, {}),
        ("llama", False, {"trainer": "transformers", "method": "dora"}),
        ("gpt2", True, {"trainer": "transformers", "method": "full"}),
        ("gemma2", True, {"trainer": "transformers", "sequence_length": 12}),
        ("mixtral", True, {"trainer": "trl", "autocast": "none", "loss": "full"}),
    ],
)
def test_an_evaluation_makes_the_tensors_that_its_trace_has(
    family: str, keeps_logits: bool, keys: dict[str, Any]
) -> None:
    evaluation = Evaluation(batch_size=3, num_batches=3, keeps_logits=keeps_logits)
    model = model_of(family, **keys)
    with StorageMeter() as meter:
        training_life.evaluate(model, real(**keys), VOCAB, evaluation)

    told = traced(family, Life(evaluation=evaluation), "evaluate", **keys)
    assert told.births == meter.births
    assert told.peak_bytes == meter.peak_bytes
    assert model.training


def test_an_evaluation_under_autocast_makes_the_tensors_that_its_trace_has() -> None:
    # Which operand is cast first is the device's own.
    keys = {"trainer": "transformers", "autocast": "bfloat16"}
    evaluation = Evaluation(batch_size=3, num_batches=2)
    model = model_of("llama", **keys)
    with StorageMeter() as meter:
        training_life.evaluate(model, real(**keys), VOCAB, evaluation)

    told = traced("llama", Life(evaluation=evaluation), "evaluate", **keys)
    assert sorted(told.births) == sorted(meter.births)
    assert told.peak_bytes == meter.peak_bytes


class Tokens(torch.utils.data.Dataset):
    """Sequences of tokens for Trainer."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCAB, (SEQUENCE,))
        return {"input_ids": tokens, "labels": tokens.clone()}


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_an_evaluation_holds_what_trainer_holds(
    keeps_logits: bool, bf16: bool, tmp_path: Path
) -> None:
    keys = {
        "trainer": "transformers",
        "autocast": "bfloat16" if bf16 else "none",
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=3,
        use_cpu=True,
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model_of("llama", **keys),
        args=arguments,
        eval_dataset=Tokens(9),
        # Without metrics, Trainer keeps losses alone.
        compute_metrics=(lambda prediction: {}) if keeps_logits else None,
    )
    if bf16:
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    with StorageMeter() as meter:
        trainer.evaluate()

    evaluation = Evaluation(batch_size=3, num_batches=3, keeps_logits=keeps_logits)
    with StorageMeter() as own:
        model = model_of("llama", **keys)
        own.start()
        training_life.evaluate(model, real(**keys), VOCAB, evaluation)
    assert own.peak_bytes == pytest.approx(meter.peak_bytes, abs=SLACK_BYTES)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("gpt2", {"method": "full"}),
        ("gemma2", {"method": "dora"}),
        ("mixtral", {}),
    ],
)
def test_a_generation_makes_the_tensors_that_its_trace_has(
    family: str, keys: dict[str, Any]
) -> None:
    # Three tokens are run one by one; of more, the trace lets caches grow alone.
    for num_tokens in (3, 9):
        generation = Generation(batch_size=3, num_tokens=num_tokens)
        model = model_of(family, **keys)
        with StorageMeter() as meter:
            training_life.generate(model, real(**keys), VOCAB, generation)
        told = traced(family, Life(generation=generation), "generate", **keys)
        # A sliding window's length goes to the card, which the CPU need not copy.
        windows = 8 * (family == "gemma2")
        assert told.peak_bytes - meter.peak_bytes == windows
        if num_tokens == 3:
            told_more = Counter(told.births) - Counter(meter.births)
            assert told_more == (Counter([8]) if windows else Counter())
            assert not Counter(meter.births) - Counter(told.births)


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("phi", "full")])
def test_a_generation_holds_what_transformers_holds(family: str, method: str) -> None:
    keys = {"method": method}
    generation = Generation(batch_size=3, num_tokens=8)
    model = model_of(family, **keys)
    with StorageMeter() as own:
        training_life.generate(model, real(**keys), VOCAB, generation)

    prompts = torch.randint(0, VOCAB, (3, SEQUENCE))
    model.eval()
    with StorageMeter() as meter:
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            use_cache=True,
        )
    assert own.peak_bytes == pytest.approx(meter.peak_bytes, abs=SLACK_BYTES)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2", {}),
        ("qwen2", {"method": "full"}),
        ("mixtral", {"method": "full"}),
        ("llama", {"quantization": "nf4-double", "dtype": "bfloat16"}),
        ("llama", {"trained_modules": ["lm_head"]}),
    ],
)
def test_saving_makes_the_tensors_that_its_trace_has(
    family: str, keys: dict[str, Any]
) -> None:
    model = model_of(family, **keys)
    with StorageMeter() as meter, tempfile.TemporaryDirectory() as folder:
        training_life.save(model, folder)
        assert [*Path(folder).glob("*.safetensors")]

    told = traced(family, Life(saves=True), "save", **keys)
    assert told.births == meter.births
    # Experts are copied, for a checkpoint holds them one by one, and the codes by which
    # quantised absmax values are read (QuantState.as_dict).
    copied = family == "mixtral" or "quantization" in keys
    assert bool(told.births) == copied


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"method": "lora"}),
        ("llama", {"method": "dora"}),
        ("qwen2", {"method": "rslora", "trained_modules": ["lm_head"]}),
        ("gpt2", {"method": "dora"}),
        ("mixtral", {"method": "lora"}),
    ],
)
def test_merging_makes_the_tensors_that_its_trace_has(
    family: str, keys: dict[str, Any]
) -> None:
    model = model_of(family, **keys)
    with StorageMeter() as meter:
        merged = training_life.merge(model)

    told = traced(family, Life(merge=CARD), "merge", **keys)
    assert told.births == meter.births
    assert told.peak_bytes == meter.peak_bytes
    assert not any("lora" in name for name, _ in merged.named_parameters())


MERGED = {(64, 64): 4, (32, 64): 4, (96, 64): 6}
"""Sides of the tiny Llama's linear layers, and how many it has of each."""


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_merged_weights_go_to_the_host_and_come_back(
    method: str, quantization: str
) -> None:
    # Beside what the CPU makes, a card gets the weight back from the host, and a 4-bit
    # code of 16 float32. int8 casts on the way, so that the CPU makes a copy as well.
    keys = {"method": method, "quantization": quantization, "dtype": "bfloat16"}
    model = model_of("llama", **keys)
    with StorageMeter() as meter:
        training_life.merge(model)

    told = traced("llama", Life(merge=CARD), "merge", **keys)
    back = Counter[int]()
    if quantization != "int8":
        # DoRA returns to the weight's precision, LoRA's sum is in the adapter's.
        itemsize = 2 if method == "dora" else 4
        for (rows, columns), count in MERGED.items():
            back[rows * columns * itemsize] += count
        back[16 * 4] += sum(MERGED.values())
    assert Counter(told.births) - Counter(meter.births) == back
    assert not Counter(meter.births) - Counter(told.births)


def test_a_merged_4_bit_weight_event_by_event() -> None:
    # peft/tuners/lora/bnb.py, Linear4bit.merge, for q_proj of (64, 64) with rank 4:
    # n = 4096 weights in 64 blocks.
    told = traced(
        "llama", Life(merge=CARD), "merge", quantization="nf4", dtype="bfloat16"
    )
    assert told.births[:10] == [
        2 * 4096,  # dequantised, in the precision it was quantised from
        4 * 4096,  # B A, float32 as the adapters are
        4 * 4096,  # times the scale
        4 * 4096,  # their sum
        4 * 4096,  # back from the host
        4 * 64,  # absmax
        4096 // 2,  # codes
        4 * 16,  # the code's values, normalised by
        4,  # the largest of them
        4 * 16,
    ]


@pytest.mark.parametrize(
    ("optimizer", "adapter_dtype"),
    [("adamw", "float32"), ("sgd-momentum", "bfloat16"), ("adafactor", "float32")],
)
def test_resuming_brings_adapters_twice_and_the_state(
    optimizer: str, adapter_dtype: str, tmp_path: Path
) -> None:
    keys = {"optimizer": optimizer, "adapter_dtype": adapter_dtype}
    model = model_of("llama", **keys)
    loop = loop_of("llama", model, **{"dtype": "float32"} | keys)
    loop.run_step(1, 1)
    training_life.save(model, str(tmp_path))
    saved = copy.deepcopy(loop.optimizer.state_dict())
    read = [*peft.get_peft_model_state_dict(model).values()]
    with StorageMeter() as meter:
        training_life.load_adapters(model, str(tmp_path))
    trained = trained_parameters(model)
    fresh = optimizers.find(optimizer).build(trained)
    fresh.load_state_dict(saved)

    # The file's tensors, in its own order, of which half precision becomes single.
    sizes = [tensor.nbytes for tensor in read]
    is_cast = adapter_dtype == "bfloat16"
    cast = [4 * tensor.numel() for tensor in read] if is_cast else []
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert sorted(meter.births[: len(sizes)]) == sorted(sizes)
    assert meter.births[len(sizes) :] == cast
    # Step counts of the state stay on the host; a card gets the rest.
    told = traced("llama", Life(resumes=True), "resume", **keys)
    state = [
        tensor.nbytes
        for tensors in fresh.state.values()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and name != "step"
    ]
    assert told.births == sizes + cast + state
    assert len(state) >= len(sizes)


@pytest.mark.parametrize("name", ["adamw-8bit", "lion-8bit", "paged-adamw-32bit"])
def test_bitsandbytes_loads_what_is_said(name: str) -> None:
    scheme = optimizers.find(name)
    shapes = [(64, 64), (63, 64), (400, 300)]
    parameters = [nn.Parameter(torch.randn(shape, device=CPU)) for shape in shapes]
    optimizer = scheme.build(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    fresh = scheme.build(parameters)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    for parameter, shape in zip(parameters, shapes, strict=True):
        tensors = [
            value.nbytes
            for value in fresh.state[parameter].values()
            if isinstance(value, torch.Tensor)
        ]
        assert tuple(tensors) == scheme.loaded_bytes(shape, 4)
