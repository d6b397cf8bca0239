"""Measures and simulates small fine-tunes on a CPU; writes reports/accuracy_cpu.md.

`python tests/cpu_report.py` writes the report; it takes two minutes. Each fine-tune is
run twice by the loop that `memplan profile` runs: once read by memplan's meter, once by
torch's own profiler.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from allocation_reader import ProfilerMeter

from memplan.footprint import Footprint, Moment
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.profiler import child
from memplan.profiler.task import Journal, Task, read_events
from memplan.recipe import Recipe
from memplan.simulator.cpu import simulate_on_cpu

REPORT = Path(__file__).parents[1] / "reports" / "accuracy_cpu.md"

WORST = 0.01
"""The largest error of any reading."""

_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 64,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED | {"tie_word_embeddings": True},
    "gemma2": _GROUPED | {"head_dim": 32, "sliding_window": 8},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "gpt_neox": _SHAPE,
    "phi": _SHAPE,
    "gpt2": {
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}

_PRUNED = {
    "rank": 8,
    "method_options": {"prune_physically": True, "target_rank": 4},
}

CASES: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("llama", {}),
    ("llama", {"method": "full"}),
    ("llama", {"padded": True}),
    ("llama", {"attention": "math", "padded": True}),
    (
        "llama",
        {
            "trainer": "transformers",
            "quantization": "nf4",
            "checkpointing": "full",
            "autocast": "bfloat16",
        },
    ),
    (
        "llama",
        {
            "trainer": "trl",
            "quantization": "nf4-double",
            "optimizer": "adamw-8bit",
            "rank": 64,
        },
    ),
    ("qwen2", {"quantization": "nf4", "checkpointing": "full", "autocast": "bfloat16"}),
    ("qwen2", {"trainer": "trl", "checkpointing": "full"}),
    ("qwen2", {"method": "dora", "quantization": "fp4", "dropout": 0.1}),
    (
        "qwen2",
        {
            "trainer": "transformers",
            "method": "full",
            "dtype": "float32",
            "optimizer": "adafactor",
        },
    ),
    ("gpt2", {"dropout": 0.1, "quantization": "int8"}),
    (
        "gpt2",
        {
            "method": "full",
            "dtype": "float32",
            "autocast": "bfloat16",
            "optimizer": "adamw-loop",
            "keep_outputs": "step",
        },
    ),
    ("gpt2", {"trainer": "transformers", "method": "rslora", "accumulation": 2}),
    (
        "gpt_neox",
        {
            "method": "dora",
            "targets": "mlp",
            "checkpointing": "full",
            "reentrant": True,
            "optimizer": "adamw-fused",
        },
    ),
    ("gpt_neox", {"trainer": "trl", "method": "rslora", "quantization": "fp4-double"}),
    ("gemma2", {"trainer": "trl", "quantization": "nf4"}),
    ("gemma2", {"method": "full", "optimizer": "adamw-8bit"}),
    ("phi", {"trainer": "transformers"}),
    (
        "phi",
        {
            "method": "full",
            "attention": "eager",
            "padded": True,
            "dtype": "float32",
            "optimizer": "sgd-momentum",
            "max_grad_norm": 1.0,
        },
    ),
    (
        "phi",
        {
            "trainer": "transformers",
            "quantization": "int8",
            "autocast": "bfloat16",
            "optimizer": "paged-adamw-32bit",
        },
    ),
    ("mixtral", {"targets": "attention"}),
    (
        "mixtral",
        {
            "quantization": "nf4",
            "targets": "attention",
            "attention": "eager",
            "optimizer": "lion-8bit",
        },
    ),
    ("llama", {"method": "relora"}),
    ("llama", {"method": "relora", "dtype": "float32"}),
    ("llama", {"method": "relora", "quantization": "nf4-double"}),
    (
        "llama",
        {
            "method": "relora",
            "quantization": "int8",
            "trainer": "transformers",
            "method_options": {"reset": "random"},
        },
    ),
    ("llama", {"method": "adaq-lora", **_PRUNED}),
    (
        "llama",
        {
            "method": "adaq-lora",
            "quantization": "nf4",
            "trainer": "transformers",
            **_PRUNED,
        },
    ),
    ("llama", {"method": "adalora", "trainer": "transformers"}),
    ("llama", {"method": "adalora", "quantization": "nf4", "max_grad_norm": 1.0}),
    ("llama", {"method": "lora-fa", "optimizer": "lora-fa"}),
    ("llama", {"method": "lora-plus", "optimizer": "adamw"}),
    ("llama", {"method": "vera", "rank": 64}),
    ("llama", {"method": "houlsby", "quantization": "nf4"}),
    ("llama", {"method": "q-bara", "trainer": "trl", "quantization": "nf4-double"}),
    ("llama", {"method": "qa-lora", "dropout": 0.1}),
    ("llama", {"method": "qa-hira", "quantization": "int8"}),
    ("llama", {"method": "ir-qlora", "quantization": "nf4-icq"}),
    ("llama", {"method": "peft", "method_options": {"peft_type": "OFT"}}),
    ("llama", {"quantization": "hqq-4bit"}),
    ("llama", {"quantization": "hqq-3bit", "checkpointing": "full"}),
    ("llama", {"quantization": "quanto-int8", "trainer": "trl"}),
    ("llama", {"quantization": "quanto-int2", "checkpointing": "full"}),
)
"""Every method, quantisation and trainer, over seven architectures."""

SMALL = {"rank": 4, "batch_size": 2, "sequence_length": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A fine-tune as simulated, as memplan's meter and as torch's profiler read it."""

    family: str
    keys: Mapping[str, Any]
    errors: Mapping[str, Mapping[str, float]]
    """By reader and reading, such as `2.backward` or `2.backward, end`."""

    @property
    def worst(self) -> dict[str, tuple[float, str]]:
        """By reader, the largest error that is judged, and of which reading it is."""
        return {
            reader: max(
                ((found[name], name) for name in found if self.judges(reader, name)),
                key=_size,
            )
            for reader, found in self.errors.items()
        }

    def judges(self, reader: str, reading: str) -> bool:
        """Whether a reading has to be right.

        Torch's profiler alone sees what one operator takes while it runs: bitsandbytes'
        8-bit optimizers make their states float32 on a CPU, and a merge adds float32 to
        16-bit weights, which converts them (TensorIterator), or quantises them.
        """
        if reader != "profiler":
            return True
        stepping = reading in ("1.optimizer", "2.optimizer")
        if stepping and "8bit" in str(self.keys.get("optimizer")):
            return False
        return reading != "restart" or self.keys.get("dtype") == "float32"


def compare(number: int) -> Compared:
    """Runs the fine-tune of that number for both readers, and simulates it."""
    family, keys = CASES[number]
    config = {**CONFIGS[family], "model_type": family}
    recipe = Recipe(**{**SMALL, **keys})
    source = ModelSource(name=family, origin="file", config=config)
    simulated = simulate_on_cpu(inspect(source), recipe)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            model=family,
            config=config,
            recipe=recipe,
            device="cpu",
            steps=2,
            folder=folder,
        )
        measured = {
            "meter": _by_meter(task, Path(folder) / "meter"),
            "profiler": _by_profiler(task, Path(folder) / "profiler"),
        }
    return Compared(
        family=family,
        keys=keys,
        errors={name: _errors(simulated, found) for name, found in measured.items()},
    )


def report(compared: Sequence[Compared]) -> str:
    """The report as Markdown."""
    lines = [_INTRODUCTION]
    lines += [
        "| # | architecture | recipe | meter | profiler |",
        "|--:|---|---|--:|--:|",
    ]
    for number, each in enumerate(compared):
        worst = (f"{error:+.2%} ({name})" for error, name in each.worst.values())
        keys = ", ".join(f"{key} {value}" for key, value in each.keys.items())
        cells = (str(number), each.family, keys or "LoRA", *worst)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    with quiet():
        compared = [compare(number) for number in range(len(CASES))]
    REPORT.write_text(report(compared), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps trainers' tables and warnings off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with (
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


_INTRODUCTION = f"""\
# Accuracy on a CPU: the bytes of tensors

Small fine-tunes run for real on a CPU, each by the loop that its trainer's users run (a
loop prepared by accelerate, transformers' Trainer, TRL's SFTTrainer), beside what is
simulated for a CPU: the same fine-tune over meta tensors, by the functions and kernels
that PyTorch takes there. Errors are (simulated - measured) / measured.

`meter` is what `memplan profile --device cpu` reads: the storages that operators touch.
`profiler` is torch's own profiler, which sees every block that the CPU's allocator
hands out, and so what kernels take for themselves while they run; that is most of what
it sees more. Each cell is the worst of all readings, with its moment: peaks of every
phase of every step, and what is held at their ends and after load and adaptation; with
ReLoRA and ADAQ-LoRA, also the restart and the pruning, and the step after them.

What differs, and why:

* the peak of the load is not compared. These weights are random and made in place;
  what is simulated is from_pretrained, with its 16-bit copies of quantised weights.
* bitsandbytes' 8-bit optimizers make their states float32 inside one operator on a CPU.
  The profiler sees that in the optimizer's moment, which is left out for it.
* a restart of ReLoRA merges float32 into 16-bit or quantised weights. On a CPU the one
  operator that adds, or quantises, converts copies, which the profiler sees and which
  are left out for it; the restart over float32 weights is judged for both.
* checkpointing keeps a copy of the generator's state, 5056 bytes a block, which no
  operator returns; the profiler sees it.
* trainers hold a few KiB that no recipe says: a second batch of tokens, a generator's
  state, running losses.
* what a card does otherwise is not tested here: its kernels' scratch and choices, the
  rounding and the cache of its allocator. That is what
  [runs on cards](accuracy_t4.md) are for.

`python tests/cpu_report.py` writes this file; `pytest tests/profiler/test_cpu_bar.py`
asserts that no error is above {WORST:.0%}, for some of them unless `-m slow` asks for
all.
"""


def _by_meter(task: Task, journal: Path) -> dict[str, Moment]:
    return _moments(_run(task, journal))


def _by_profiler(task: Task, journal: Path) -> dict[str, Moment]:
    meter = ProfilerMeter()
    with mock.patch.object(child, "CpuMeter", return_value=meter):
        events = _run(task, journal)
    read = iter(meter.peaks())
    return _moments(
        [
            {**event, "allocated_bytes": peak, "end_allocated_bytes": end}
            for event in events
            for peak, end in [next(read)]
        ]
    )


def _run(task: Task, journal: Path) -> list[Mapping[str, Any]]:
    """The moments of a run in this process, which must not know of runs before it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    gc.collect()
    child.run(task, Journal(journal))
    return [event for event in read_events(journal) if event["event"] == "moment"]


def _moments(events: Sequence[Mapping[str, Any]]) -> dict[str, Moment]:
    found: dict[str, Moment] = {}
    for event in events:
        label = event["label"]
        moment = Moment(
            label=label,
            allocated_bytes=event["allocated_bytes"],
            reserved_bytes=0,
            end_allocated_bytes=event["end_allocated_bytes"],
        )
        found[label] = found[label].merged(moment) if label in found else moment
    return found


def _errors(simulated: Footprint, measured: Mapping[str, Moment]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for moment in simulated.moments:
        read = measured[moment.label]
        end = moment.end_allocated_bytes / read.end_allocated_bytes - 1
        errors[f"{moment.label}, end"] = end
        if moment.label != "load":
            peak = moment.allocated_bytes / read.allocated_bytes - 1
            errors[moment.label] = peak
    return errors


def _size(found: tuple[float, str]) -> float:
    return abs(found[0])


if __name__ == "__main__":
    main()
