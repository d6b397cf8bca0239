"""Sets the papers that memplan began from beside what memplan says: reports/seeds.md.

`python reports/make_seeds.py` takes some minutes, and no card.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan import methods, simulator
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.recipe import Recipe
from memplan.units import MIB

REPORT = Path(__file__).with_name("seeds.md")

GLM, LLAMA_2 = "THUDM/chatglm2-6b", "meta-llama/Llama-2-7b-hf"
LLAMA_7B, LLAMA_13B = "huggyllama/llama-7b", "huggyllama/llama-13b"
LLAMA_65B = "huggyllama/llama-65b"

LENGTHS = (256, 512, 1024, 2048)
CHECKPOINTING = ("none", "full")

ADAQ_TABLE = {
    "GLM2": (51875, 48885),
    "GLM2+LoRA": (40132, 59551),
    "GLM2+QLoRA": (9231, 12626),
    "GLM2+ADAQ-LoRA": (8446, 9072),
}
"""Tables 1 and 2 of Feng et al. (2024), "Memory/MB", Alpaca and School."""

NF4 = {"quantization": "nf4-double", "dtype": "float16", "compute_dtype": "float16"}

ADAQ_ROWS: Mapping[str, dict[str, Any]] = {
    "GLM2": {"method": "full", "dtype": "float16"},
    "GLM2+LoRA": {"method": "lora", "dtype": "float16"},
    "GLM2+QLoRA": {"method": "lora", **NF4},
    "GLM2+ADAQ-LoRA": {"method": "adaq-lora", **NF4},
}

ADAQ_STATED = {"optimizer": "paged-adamw-32bit", "max_grad_norm": 0.1, "batch_size": 1}

MLP, SECOND_HALF = ".*mlp.*", r".*layers\.({})\..*"

BOTH_PAPERS = "33.42 and 50.13 % for 7B, 33.47 and 50.20 % for 13B"

SIDE_BY_SIDE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("QLoRA", {"method": "lora"}),
    ("ADAQ-LoRA", {"method": "adaq-lora"}),
    ("IR-QLoRA", {"method": "ir-qlora", "quantization": "nf4-icq"}),
    (
        "IR-QLoRA, published forward",
        {
            "method": "ir-qlora",
            "quantization": "nf4-icq",
            "method_options": {"forward": "official"},
        },
    ),
    ("QA-LoRA", {"method": "qa-lora"}),
    (
        "QA-LoRA, published pooling",
        {"method": "qa-lora", "method_options": {"pooling": "avg-pool"}},
    ),
    ("Q-BaRA (2)", {"method": "q-bara"}),
    ("QA-HiRA (4, 8)", {"method": "qa-hira"}),
    ("QA-HiRA (8, 8)", {"method": "qa-hira", "method_options": {"lambda1": 8}}),
)


def main() -> None:
    """Writes the report."""
    REPORT.write_text(report())


def report() -> str:
    """The whole report."""
    parts = (_INTRODUCTION, _adaq(), _optimizing(), _key_variables(), _side_by_side())
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# The papers' tables beside memplan's

Written by `python reports/make_seeds.py`; nothing in it is fitted. Where a paper leaves
a knob open, memplan's figure is the range over that knob. Figures are allocated MiB at
the worst moment of a training step, as torch.cuda.max_memory_allocated would say,
without a card's context (0.1 to 0.7 GB more in nvidia-smi), unless another is named."""


def _adaq() -> str:
    glm = inspect(GLM)
    rows = []
    for name, printed in ADAQ_TABLE.items():
        found = dict(_sweep(glm, ADAQ_ROWS[name] | ADAQ_STATED | {"rank": 8}))
        low, high = min(found.values()), max(found.values())
        near = [min(found, key=lambda k: abs(found[k] - p)) for p in printed]
        rows.append(
            (
                name,
                f"{printed[0]} / {printed[1]}",
                f"{low} to {high}",
                *(f"{key} ({found[key]})" for key in near),
            )
        )
    return _section(
        "ADAQ-LoRA (Feng et al., 2024): ChatGLM2-6B on an A100",
        "Stated: paged AdamW, max_grad_norm 0.1, batch 1, learning rate 3e-4, 5 epochs."
        " Not stated: bits, ranks, targets, sequence length, precision, checkpointing. "
        f"Swept here: sequence length {LENGTHS[0]} to {LENGTHS[-1]}, checkpointing on "
        "and off; taken: float16, rank 8 on all linear layers, NF4 with double "
        "quantisation where the row says Q. The printed unit is MB.",
        _table(
            (
                "row",
                "printed (Alpaca / School)",
                "memplan, over both knobs",
                "nearest to Alpaca",
                "nearest to School",
            ),
            rows,
        ),
        _adaq_claims(glm),
    )


def _adaq_claims(glm: Architecture) -> str:
    alpaca = {name: row[0] for name, row in ADAQ_TABLE.items()}
    school = {name: row[1] for name, row in ADAQ_TABLE.items()}
    adaq, qlora, lora = "GLM2+ADAQ-LoRA", "GLM2+QLoRA", "GLM2+LoRA"
    lines = [
        f'* "80 %" less than LoRA (Alpaca) is {_less(alpaca, adaq, lora)}; "75 %" '
        f'(School) is {_less(school, adaq, lora)}. "5 %" less than QLoRA is '
        f'{_less(alpaca, adaq, qlora)}; "30 %" is {_less(school, adaq, qlora)}.',
        f"* LoRA above full fine-tuning (School: {school[lora]} over {school['GLM2']}) "
        "cannot be under the same settings: it holds the same activations, and its "
        "gradients and optimizer's states are a fraction. The two rows must differ in "
        "batch, length or checkpointing.",
        "* The row of the model itself is called the original model, but is above what "
        f"inference takes. {_full_in_half(glm)}",
        *_pruning_lines(glm, qlora, adaq),
    ]
    return "\n".join(lines)


def _full_in_half(glm: Architecture) -> str:
    """What a full fine-tune with its moments on the card takes, by two lengths."""
    keys = {"method": "full", "dtype": "float16", "optimizer": "adamw-fused"}
    short, long = (
        _peak(glm, Recipe(sequence_length=length, **keys))
        for length in (LENGTHS[0], LENGTHS[-1])
    )
    return (
        "A full fine-tune in float16 with AdamW's moments in float16 on the card takes "
        f"{short} to {long} MiB ({LENGTHS[0]} to {LENGTHS[-1]} tokens), which both "
        "printed figures lie in or near; paged float32 moments lie outside of torch's "
        "numbers, and in nvidia-smi's add 8 bytes a parameter, 47635 MiB."
    )


def _pruning_lines(glm: Architecture, qlora: str, adaq: str) -> Iterator[str]:
    printed = [ADAQ_TABLE[qlora][i] - ADAQ_TABLE[adaq][i] for i in (0, 1)]
    yield (
        f"* ADAQ-LoRA is printed {printed[0]} and {printed[1]} MB below QLoRA. memplan "
        "at 512 tokens with checkpointing, AdamW on the card, at equal initial rank, "
        "half of it left at the end:"
    )
    for rank in (8, 64):
        shared = NF4 | {"rank": rank, "checkpointing": "full", "max_grad_norm": 0.1}
        plain = _peak(glm, Recipe(method="lora", **shared))
        masked = _peak(glm, Recipe(method="adaq-lora", **shared))
        options = {"prune_physically": True}
        pruned = simulator.simulate(
            glm, Recipe(method="adaq-lora", method_options=options, **shared)
        )
        last = max(m.allocated_bytes for m in pruned.moments if m.label[0] == "3")
        yield (
            f"  rank {rank}: QLoRA {plain}, masked {masked} ({masked - plain:+}), and "
            f"after physical pruning {last // MIB} ({last // MIB - plain:+}). Masking "
            "alone releases nothing: importance takes 12 bytes a trained number."
        )
    yield (
        "* So a lower rank explains some hundred MB at most, and only where triplets "
        "really go; the rest of the printed difference needs another length, batch or "
        "set of targets, of which the paper says nothing."
    )


def _sweep(
    architecture: Architecture, keys: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Peaks in MiB by the knobs that a paper leaves open."""
    for length, checkpointing in itertools.product(LENGTHS, CHECKPOINTING):
        recipe = Recipe(sequence_length=length, checkpointing=checkpointing, **keys)
        yield f"{length}, {checkpointing}", _peak(architecture, recipe)


def _less(column: Mapping[str, int], name: str, other: str) -> str:
    return f"{1 - column[name] / column[other]:.2%}"


def _optimizing() -> str:
    llama = inspect(LLAMA_2)
    rows = [
        (
            "load in fp32",
            "28 GB",
            f"{_weights_gb(llama, 'none', 'float32'):.2f} GB",
            "the nominal 7.0e9 weights times 4; there are 6.74e9",
        ),
        (
            "8-bit quantisation alone",
            "28 GB",
            f"{_weights_gb(llama, 'int8'):.2f} GB",
            "28 is the load in fp32; inconsistent with 8-bit weights",
        ),
        (
            "4-bit quantisation alone",
            "15 GB",
            f"{_weights_gb(llama, 'nf4'):.2f} GB",
            "15 is near a load in 16 bits, and above the 10.8 for training",
        ),
        (
            "full fine-tune",
            "112 GB",
            _full_range(llama),
            "4 x 28: weights, gradients and two moments in fp32, no activations "
            "(torch's default AdamW holds a fifth copy for a moment); "
            '"16-bit" would be 84 by the same paper\'s 780 GB for 65B',
        ),
        (
            "full fine-tune of LLaMA-65B",
            "more than 780 GB",
            _states_of_65b(),
            "12 bytes a parameter (weights and gradients in 16 bits, moments in fp32) "
            "times 65e9; the 112 for 7B counts 16",
        ),
        (
            "LoRA alone, ranks 1 and 4 beside 64",
            '"minimal overhead", "additional" memory; no figures',
            _states_by_rank(llama),
            "parameters, gradients and moments of all linear layers, whatever the base",
        ),
        (
            "4-bit, LoRA rank 16",
            "10.8 GB",
            _qlora_range(llama),
            "targets, length, batch and checkpointing are not stated",
        ),
        (
            "the same, in theory",
            "9.3 GB",
            "the row above",
            '112 / 12 = 9.33, its own "12 times"; no derivation is given',
        ),
        (
            '"12 times more efficient"',
            "112 over 9.3",
            f"{112 / 10.8:.1f} times",
            "112 over the 10.8 that were read",
        ),
    ]
    head = ("figure", "printed", "memplan", "what explains the rest")
    return _section(
        "Optimising the fine-tuning process (Mahim and Das): LLaMA-2-7B on Colab",
        _table(head, rows),
    )


def _states_of_65b() -> str:
    """Without activations, by the paper's own two ways to count."""
    total = inspect(LLAMA_65B).total_parameters
    return f"{12 * total / 1e9:.0f} GB, or {16 * total / 1e9:.0f} GB all in fp32"


def _states_by_rank(llama: Architecture) -> str:
    """Gigabytes of float32 adapters, gradients and AdamW's two moments."""
    found = {
        rank: 16 * methods.trained_in_adapters(llama, Recipe(rank=rank)) / 1e9
        for rank in (1, 4, 64)
    }
    return ", ".join(f"rank {rank}: {size:.2f} GB" for rank, size in found.items())


def _weights_gb(
    architecture: Architecture, quantization: str, dtype: str = "float16"
) -> float:
    """Gigabytes that are allocated when the model is loaded."""
    recipe = Recipe(quantization=quantization, dtype=dtype)
    footprint = simulator.simulate(architecture, recipe)
    load = next(moment for moment in footprint.moments if moment.label == "load")
    return load.end_allocated_bytes / 1e9


def _full_range(llama: Architecture) -> str:
    keys = {"method": "full", "dtype": "float32", "optimizer": "adamw-fused"}
    found = [
        _peak(llama, Recipe(sequence_length=length, **keys)) for length in (256, 1024)
    ]
    return f"{_gb(found[0])} to {_gb(found[1])} GB (256 to 1024 tokens, fused AdamW)"


def _qlora_range(llama: Architecture) -> str:
    found = {}
    for targets in (("q_proj", "v_proj"), "all-linear"):
        keys = NF4 | {"rank": 16, "targets": targets}
        for key, peak in _sweep(llama, keys):
            found[f"{'q, v' if targets != 'all-linear' else 'all'}, {key}"] = peak
    near = min(found, key=lambda key: abs(found[key] * MIB / 1e9 - 10.8))
    low, high = min(found.values()), max(found.values())
    return (
        f"{_gb(low)} to {_gb(high)} GB over targets, length and checkpointing; "
        f"nearest: {near} ({_gb(found[near])})"
    )


def _gb(mebibytes: int) -> str:
    return f"{mebibytes * MIB / 1e9:.1f}"


def _key_variables() -> str:
    rows = []
    for name in (LLAMA_7B, LLAMA_13B):
        architecture = inspect(name)
        whole = _count(architecture, rank=64)
        for what, pattern in _uneven(architecture):
            for share in (2, 4):
                count = _count(
                    architecture, rank=64, rank_pattern={pattern: 64 // share}
                )
                rows.append(
                    (
                        f"{name}, {what} at 1/{share}",
                        f"{count:,}",
                        f"{1 - count / whole:.2%}",
                        f"{(1 - 1 / share) * _weight_share(architecture, pattern):.2%}",
                    )
                )
        hira = _count(architecture, method="qa-hira")
        uneven = _count(architecture, method="qa-hira", lambda_pattern={MLP: 8})
        rows.append(
            (
                f"{name}, QA-HiRA (8, 8) for MLPs beside (4, 8)",
                f"{uneven:,}",
                f"{1 - uneven / hira:.2%}",
                f"{0.5 * _weight_share(architecture, MLP):.2%}",
            )
        )
    head = ("rank 64, all linear layers", "trained", "less, as counted")
    return _section(
        "An in-depth analysis of key variables (Shen et al., 2025)",
        "Section 4.1 states the saving of MLP ranks halved and quartered: "
        f"{BOTH_PAPERS}. That is the share of the layers' own weights, inputs times "
        "outputs, which no LoRA parameter is: the true savings are in the third "
        "column, and the paper's way of counting in the fourth. It holds for adapters "
        "of full rank alone, as QA-HiRA's.",
        _table((*head, "less, by weights"), rows),
    )


def _uneven(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Kinds and depths of layers, as the paper varies them, with PEFT's patterns."""
    num_layers = architecture.num_layers
    yield "attention", ".*self_attn.*"
    yield "MLP", MLP
    halves = range(num_layers // 2), range(num_layers // 2, num_layers)
    for what, half in zip(("first half", "second half"), halves, strict=True):
        yield what, SECOND_HALF.format("|".join(map(str, half)))


def _weight_share(architecture: Architecture, pattern: str) -> float:
    """The share of the adapted layers' weights whose paths match."""
    adapted = methods.adapted_linears(architecture, Recipe())
    whole = sum(linear.num_weights for _, linear in adapted)
    part = sum(
        linear.num_weights
        for path, linear in adapted
        if methods.matching({pattern: True}, path)
    )
    return part / whole


def _count(architecture: Architecture, **keys: Any) -> int:
    recipe = Recipe(**keys)
    method = methods.find(recipe.method)
    return sum(
        method.trainable_parameters(
            linear, methods.rank_at(recipe, path), methods.options_at(recipe, path)
        )
        for path, linear in methods.adapted_linears(architecture, recipe)
    )


def _side_by_side() -> str:
    llama = inspect(LLAMA_7B)
    rows = []
    for name, keys in SIDE_BY_SIDE:
        keys = {"quantization": "nf4-double", "rank": 64, "alpha": 16, **keys}
        peaks = [
            _peak(llama, Recipe(checkpointing=checkpointing, **keys))
            for checkpointing in CHECKPOINTING
        ]
        rows.append((name, f"{_count(llama, **keys):,}", *map(str, peaks)))
    head = ("method", "trained", "MiB", "MiB, checkpointed")
    return _section(
        "The seeds' methods side by side",
        "LLaMA-7B, rank 64 on all linear layers, NF4 with double quantisation, batch 1 "
        "of 512 tokens, AdamW on the card, float32 adapters.",
        _table(head, rows),
    )


def _peak(architecture: Architecture, recipe: Recipe) -> int:
    """The peak of the training steps in whole MiB."""
    return simulator.simulate(architecture, recipe).peak.allocated_bytes // MIB


def _section(title: str, *parts: str) -> str:
    return "\n\n".join((f"## {title}", *parts))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---" if _is_text(cell) else "--:" for cell in rows[0])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, tuple(rule), *rows))


def _is_text(cell: str) -> bool:
    return any(character.isalpha() for character in cell)


if __name__ == "__main__":
    main()
