"""A user's own training, watched from within and compared with its prediction."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from memplan import callback, runs
from memplan.callback import (
    MemplanCallback,
    Verdict,
    longest_row,
    quantization_of,
    recipe_of,
    warn_of_longest,
    watch,
)
from memplan.errors import InputError
from memplan.footprint import Footprint
from memplan.profiler import loops
from memplan.recipe import Recipe

datasets = pytest.importorskip("datasets")

torch.set_num_threads(1)

CONFIG = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
    max_position_embeddings=64,
    use_cache=False,
)
TOKENS = 32
LORA = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    task_type="CAUSAL_LM",
)


_TARGETS: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}


def lora_model() -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIG), dtype=torch.bfloat16
    )
    return peft.get_peft_model(model, copy.deepcopy(LORA))


def rows(*lengths: int) -> Any:
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": list(range(length)),
                "labels": list(range(length)),
                "attention_mask": [1] * length,
            }
            for length in lengths
        ]
    )


def arguments(folder: Path, **keys: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch",
        **keys,
    )


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def test_a_trainer_s_first_steps_are_kept_and_are_as_predicted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looking = MemplanCallback(name="tiny", out=tmp_path / "runs")
    trainer = transformers.Trainer(
        model=lora_model(),
        args=arguments(tmp_path),
        train_dataset=rows(*[TOKENS] * 6),
        callbacks=[looking],
    )
    with caplog.at_level(logging.INFO, "memplan"):
        trainer.train()

    verdict = looking.verdict
    assert verdict is not None
    assert abs(verdict.errors["allocated"]) < 0.01
    assert "predicted beside measured: allocated" in caplog.text
    (run,) = runs.load(tmp_path / "runs")
    assert run == verdict.run
    assert (run.source, run.device) == ("memplan callback", "cpu")
    assert run.recipe.trainer == "transformers"
    assert (run.recipe.batch_size, run.recipe.sequence_length) == (2, TOKENS)
    assert (run.recipe.rank, run.recipe.alpha) == (4, 8)
    assert run.recipe.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert run.footprint is not None
    assert [moment.label for moment in run.footprint.moments] == [
        f"{step}.{phase}"
        for step in (1, 2)
        for phase in ("forward", "backward", "optimizer")
    ]


def quantized_model(folder: Path, *, prepared: bool) -> Any:
    """LoRA on a checkpoint that transformers quantised to NF4."""
    dense = lora_model().unload()
    dense.save_pretrained(folder / "checkpoint")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint",
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model.config.use_cache = False
    if prepared:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=False
        )
    return peft.get_peft_model(model, copy.deepcopy(LORA))


def test_a_quantised_base_with_accumulation_is_as_predicted(tmp_path: Path) -> None:
    looking = MemplanCallback(name="tiny", out=tmp_path / "runs")
    transformers.Trainer(
        model=quantized_model(tmp_path, prepared=True),
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows(*[TOKENS] * 12),
        callbacks=[looking],
    ).train()

    verdict = looking.verdict
    assert verdict is not None
    recipe = verdict.run.recipe
    assert (recipe.quantization, recipe.accumulation) == ("nf4", 2)
    assert recipe.kbit_prepare
    assert abs(verdict.errors["allocated"]) < 0.01


@pytest.mark.parametrize("lengths", [(TOKENS,) * 12, (TOKENS, 20) * 6])
def test_trl_s_trainer_is_watched_as_any(
    lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """With rows of one length, and of two that are filled up to the longer."""
    trl = pytest.importorskip("trl")
    looking = MemplanCallback(name="tiny", out=tmp_path / "runs")
    keys = arguments(tmp_path).to_dict()
    told = ("output_dir", "use_cpu", "max_steps", "per_device_train_batch_size")
    kept = ("report_to", "save_strategy", "logging_strategy", "disable_tqdm")
    trainer = trl.SFTTrainer(
        model=lora_model(),
        args=trl.SFTConfig(
            **{key: keys[key] for key in (*told, *kept)},
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
        ),
        train_dataset=rows(*lengths),
        processing_class=loops._tokenizer(),
        callbacks=[looking],
    )
    trainer.train()

    verdict = looking.verdict
    assert verdict is not None
    assert verdict.run.recipe.trainer == "trl"
    assert verdict.run.recipe.sequence_length == TOKENS
    assert abs(verdict.errors["allocated"]) < 0.01


def test_hooks_are_gone_when_the_first_steps_are_over(tmp_path: Path) -> None:
    model = lora_model()
    transformers.Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(*[TOKENS] * 6),
        callbacks=[MemplanCallback(out=None)],
    ).train()

    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_plain_loop_is_watched(tmp_path: Path) -> None:
    model = lora_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    recipe = Recipe(
        rank=4,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        batch_size=2,
        sequence_length=TOKENS,
    )
    with watch(model, optimizer, recipe, name="tiny", out=tmp_path) as seen:
        for _ in range(3):
            tokens = torch.randint(0, 1024, (2, TOKENS))
            outputs = model(input_ids=tokens, labels=tokens)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del outputs

    assert seen.is_done
    (run,) = runs.load(tmp_path)
    compared = callback.accuracy.compare(
        run, "simulate", lambda case: callback._predict(run)
    )
    assert abs(compared.errors["allocated"]) < 0.01


def test_a_loop_that_ends_early_keeps_nothing(tmp_path: Path) -> None:
    model = lora_model()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with watch(model, optimizer, Recipe(), out=tmp_path):
        pass

    assert runs.load(tmp_path) == ()


def test_evaluation_between_steps_is_not_a_step(tmp_path: Path) -> None:
    model = lora_model()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(0, 1024, (2, TOKENS))
    with watch(model, optimizer, Recipe(), out=None) as seen:
        model.eval()
        model(input_ids=tokens)
        model.train()

        assert not seen.is_done
        assert seen.shape == (0, 0)


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"bf16": True}, "autocast", "bfloat16"),
        ({"max_grad_norm": 0.5}, "max_grad_norm", 0.5),
        ({"max_grad_norm": 0.0}, "max_grad_norm", None),
        ({"gradient_accumulation_steps": 4}, "accumulation", 4),
    ],
)
def test_the_recipe_is_read_off_the_arguments(
    keys: dict[str, Any], field: str, value: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(lora_model(), arguments(tmp_path, **keys), (2, TOKENS))

    assert getattr(recipe, field) == value
    assert (recipe.method, recipe.optimizer, recipe.dtype) == (
        *("lora", "adamw"),
        "bfloat16",
    )


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4-double",
        ),
    ],
)
def test_quantisation_is_read_off_the_config(told: dict[str, Any], name: str) -> None:
    model = lora_model()
    assert quantization_of(model) == "none"
    model.config.quantization_config = transformers.BitsAndBytesConfig(**told)

    assert quantization_of(model) == name


def test_a_scheme_that_memplan_does_not_know_is_named() -> None:
    model = lora_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}

    with pytest.raises(InputError, match="gptq"):
        quantization_of(model)


def test_the_longest_row_is_known_where_rows_are_tokenized(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(rows(5, 40, 12))

    assert longest_row(loader, arguments(tmp_path)) == 40
    assert longest_row(None, arguments(tmp_path)) == 0


def test_a_longer_batch_that_does_not_fit_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from measured_runs import CARD, measured, moment

    run = measured()
    assert run.footprint is not None
    lacking = Footprint(
        moments=(moment("2.backward", 900, 1000),),
        context_bytes=CARD.context_bytes,
        capacity_bytes=CARD.capacity_bytes,
        failed_moment="2.backward",
        missing_bytes=2**30,
    )
    asked: list[int] = []

    def predict(one: Any) -> Footprint:
        asked.append(one.recipe.sequence_length)
        return lacking

    monkeypatch.setattr(callback, "_predict", predict)
    verdict = Verdict(run=run, predicted=run.footprint, errors={})

    text = warn_of_longest(verdict, 4096)
    assert "Sequences of 4096 tokens are to come, 64 is the longest so far" in text
    assert "1.00 GiB" in text
    assert text in caplog.text
    assert asked == [4096]
    assert warn_of_longest(verdict, 64) == ""
    on_cpu = dataclasses.replace(run, gpu=None, device="cpu")
    assert warn_of_longest(dataclasses.replace(verdict, run=on_cpu), 4096) == ""


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (
            peft.AdaLoraConfig(
                init_r=6, target_r=2, total_step=50, lora_alpha=12, **_TARGETS
            ),
            {"method": "adalora", "rank": 6},
        ),
        (peft.VeraConfig(r=16, **_TARGETS), {"method": "vera", "rank": 16}),
        (peft.LoraConfig(use_dora=True, **_TARGETS), {"method": "dora", "rank": 8}),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_other_methods_of_peft_are_read_off_and_as_predicted(
    config: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    looking = MemplanCallback(name="tiny", out=None)
    adapted = peft.get_peft_model(lora_model().unload(), config)
    for name, parameter in adapted.named_parameters():
        # PEFT 0.21 makes it trained on 16-bit bases.
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    transformers.Trainer(
        model=adapted,
        args=arguments(tmp_path),
        train_dataset=rows(*[TOKENS] * 6),
        callbacks=[looking, _Allocating()],
    ).train()

    verdict = looking.verdict
    assert verdict is not None
    recipe = verdict.run.recipe
    assert {key: getattr(recipe, key) for key in keys} == keys
    assert abs(verdict.errors["allocated"]) < 0.01


class _Allocating(transformers.TrainerCallback):
    """What AdaLoRA asks of a training: importance is updated before gradients go."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if model.peft_type == "ADALORA":
            model.base_model.update_and_allocate(state.global_step + 1)


def test_a_tuner_that_cannot_be_read_off_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looking = MemplanCallback(name="tiny", out=tmp_path / "runs")
    config = peft.LoHaConfig(r=4, **_TARGETS)
    trainer = transformers.Trainer(
        model=peft.get_peft_model(lora_model().unload(), config),
        args=arguments(tmp_path),
        train_dataset=rows(*[TOKENS] * 6),
        callbacks=[looking],
    )
    trainer.train()

    assert trainer.state.global_step == 3
    assert looking.verdict is None
    assert "LoHaConfig" in caplog.text
    assert "give MemplanCallback a recipe" in caplog.text
