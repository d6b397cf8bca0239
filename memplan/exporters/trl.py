"""A script of TRL's SFTTrainer: model, adapter and arguments as planned.

Written for TRL 1.16 on transformers 5.23, or on what is installed: before 5.23
checkpointing has other names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any, ClassVar

from memplan.exporters import Exporter, Statement, Task
from memplan.exporters._header import commented, header
from memplan.exporters._lora import lora_config, verify
from memplan.exporters._trainer import (
    attention_name,
    checkpointing_keys,
    differences,
    former_checkpointing_keys,
    optimizer_name,
    quantization_keys,
)
from memplan.recipe import Recipe

NAMES_SINCE = (5, 23)
"""The transformers that calls checkpointing `activation_checkpointing`."""

NOT_LORA_CONFIG = ("peft_type", "base_model_name_or_path", "inference_mode")
"""Keys of adapter_config.json that PEFT sets by itself."""

SCRIPT = """\
{header}
import argparse

import torch
from datasets import load_dataset
{peft_import}from transformers import {transformers}
from trl import SFTConfig, SFTTrainer

MODEL = {model}

LOAD = {load}
{quantization}{adapter}
TRAIN = {train}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes as memplan planned.")
    parser.add_argument("--data", required=True, help="JSON lines, each with a text")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--output", default="output")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    given = parser.parse_args()

    on_card = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        given.model,
        device_map={{"": 0}} if on_card else None,
        **LOAD,
{load_quantized}    )
{prepare}    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(given.model),
        train_dataset=load_dataset("json", data_files=given.data, split="train"),
        args=SFTConfig(
            output_dir=given.output,
            max_steps=given.max_steps,
            learning_rate=given.learning_rate,
            use_cpu=not on_card,
            **TRAIN,
        ),
{peft_argument}    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
"""


class Trl(Exporter):
    """train.py."""

    summary: ClassVar[str] = "a script of TRL's SFTTrainer"

    def check(self, task: Task) -> Statement:
        train_arguments(task.recipe)
        quantization_keys(task.recipe)
        stated = Statement(
            unverified=(
                "a run of this script with this model; memplan's tests run one of a "
                "small model, on a CPU.",
            )
        )
        if task.recipe.method == "full":
            return stated
        return verify(task, lora_config(task)) + stated

    def files(self, task: Task, statement: Statement) -> Mapping[str, str]:
        return {"train.py": script(task, statement)}


def script(task: Task, statement: Statement) -> str:
    """The script's text."""
    recipe = task.recipe
    quantization = quantization_keys(recipe)
    has_adapter = recipe.method != "full"
    prepared = bool(quantization) and has_adapter and recipe.kbit_prepare
    imports = [
        *(["LoraConfig"] if has_adapter else []),
        *(["prepare_model_for_kbit_training"] if prepared else []),
    ]
    return SCRIPT.format(
        header=commented(header(task, statement, differences(task, "trl", KEPT))),
        model=_literal(task.model),
        load=_literal(
            {"dtype": recipe.dtype, "attn_implementation": attention_name(recipe)}
        ),
        transformers=_CLASSES + (", BitsAndBytesConfig" if quantization else ""),
        peft_import=f"from peft import {', '.join(imports)}\n" if imports else "",
        quantization=f"\nQUANTIZATION = {_literal(quantization)}\n"
        if quantization
        else "",
        adapter=f"\nADAPTER = {_literal(_adapter(task))}\n" if has_adapter else "",
        train=_literal(train_arguments(recipe)),
        load_quantized=_QUANTIZED if quantization else "",
        prepare=_PREPARE.format(checkpointed=recipe.checkpointing == "full")
        if prepared
        else "",
        peft_argument="        peft_config=LoraConfig(**ADAPTER),\n"
        if has_adapter
        else "",
    )


KEPT = ("autocast", "kbit_prepare", "max_grad_norm")
"""Keys of the recipe that the script hands on."""

_CLASSES = "AutoModelForCausalLM, AutoTokenizer"

_QUANTIZED = "        quantization_config=BitsAndBytesConfig(**QUANTIZATION),\n"

_PREPARE = """\
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing={checkpointed}
    )
"""


def train_arguments(recipe: Recipe, transformers: str = "") -> dict[str, Any]:
    """SFTConfig's arguments, by the version of transformers, or the installed one."""
    return {
        "max_length": recipe.sequence_length,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "optim": optimizer_name(recipe),
        "max_grad_norm": recipe.max_grad_norm or 0.0,
        "bf16": recipe.autocast == "bfloat16",
        "fp16": recipe.autocast == "float16",
        "use_liger_kernel": recipe.loss == "liger",
        **_checkpointing(recipe, transformers or _installed()),
    }


def _checkpointing(recipe: Recipe, transformers: str) -> dict[str, Any]:
    major, minor = map(int, transformers.split(".")[:2])
    if (major, minor) >= NAMES_SINCE:
        return checkpointing_keys(recipe)
    return former_checkpointing_keys(recipe)


def _installed() -> str:
    """The installed transformers; the one that the script is written for else."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return ".".join(map(str, NAMES_SINCE))


def _adapter(task: Task) -> dict[str, Any]:
    config = lora_config(task)
    return {key: config[key] for key in config if key not in NOT_LORA_CONFIG}


def _literal(value: Any) -> str:
    """The value as Python writes it, a mapping's keys a line each."""
    if isinstance(value, Mapping):
        lines = (f"    {_literal(k)}: {_flat(v)},\n" for k, v in value.items())
        return f"{{\n{''.join(lines)}}}"
    return _flat(value)


def _flat(value: Any) -> str:
    """The value on a line, texts in double quotes."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_flat(k)}: {_flat(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flat, value))}]"
    return repr(value)


PART = Trl()
