"""Simulates fine-tunes by every way to the loss and writes reports/loss_paths.md.

`python reports/make_loss_paths.py` takes about a minute, and no card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan import losses, registry, simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.footprint import Moment
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator.events import FREE, MARK, EventLog
from memplan.simulator.replay import Replay, replay
from memplan.store import profiles_path, read_json
from memplan.units import GIB, parse_size

REPORT = Path(__file__).with_name("loss_paths.md")

CARD = "A100 80GB"
MODELS = ("meta-llama/Llama-3.1-8B", "google/gemma-2-2b")
LENGTHS = (2048, 8192)
SHARED = {"trainer": "transformers", "checkpointing": "full"}

PASSES = ("2.forward", "2.backward")

NEUTRALITY = "research-neutrality-cost"

TORCHTUNE = "meta-llama/Llama-3.2-3B"
TORCHTUNE_BATCH, TORCHTUNE_LENGTH = 2, 4096
TORCHTUNE_RECIPE = {
    "method": "full",
    "optimizer": "adamw-fused",
    "batch_size": TORCHTUNE_BATCH,
    "sequence_length": TORCHTUNE_LENGTH,
    "keep_outputs": "none",
}
FULL_GIB, COMPILED_GIB, CHUNKED_GIB, CHECKPOINTED_GIB = 60.0, 51.0, 42.9, 24.9
"""Peak active memory: pytorch/torchtune 1814feb17, README.md, Optimization flags."""

LONGEST_CONTEXT = 131_072
"""Positions of torchtune's rotary table (`llama3_2_3b`, max_seq_len)."""

HALF, FLOAT = 2, 4


def main() -> None:
    """Writes the report."""
    REPORT.write_text(report())


def report() -> str:
    """The whole report."""
    parts = (_INTRODUCTION, _ways(), _sweeps(), _neutrality(), _torchtune())
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Ways to the loss

What `memplan simulate` says that each `loss` costs, and what public runs say of it.
`python reports/make_loss_paths.py` writes this file. GiB are of 2^30 bytes."""


def _ways() -> str:
    rows = [(f"`{name}`", losses.find(name).summary) for name in _names()]
    return _section("The ways", _table(("loss", "is"), rows), _WAYS)


_WAYS = """\
`full`, `chunked` and `chunked-nll` are traced as their code runs. `liger` and `cut` are
Triton kernels: what they allocate is written down from their source, as is what the
compiler makes of `chunked-logits`. Of Liger the loss alone is meant."""


def _sweeps() -> str:
    sweeps = (_sweep(model, length) for model in MODELS for length in LENGTHS)
    return _section("By model and length", _SWEEPS, *sweeps)


_SWEEPS = f"""\
LoRA of rank 16 on every linear layer in bfloat16, one sequence, blocks checkpointed,
Trainer's loop, {CARD}. `around` is the most that is allocated while no block is at
work but the last norm, the head and the loss are, forward or backward. Where the peak
is in a block, no loss that takes less around the blocks would lower it."""


def _sweep(model: str, length: int) -> str:
    architecture = inspect(model)
    rows = []
    full_bytes = 0
    for name in _names():
        keys = SHARED | {"loss": name, "sequence_length": length}
        log, found = _simulate(architecture, keys)
        peak = _peak(found)
        full_bytes = full_bytes or peak.allocated_bytes
        rows.append(
            (
                f"`{name}`",
                _gib(_most_around_blocks(log)),
                _gib(peak.allocated_bytes),
                _gib(peak.reserved_bytes),
                "a block" if _in_block(found.peak_blocks[-1].module) else "the head",
                f"{peak.allocated_bytes / full_bytes - 1:+.1%}",
            )
        )
    head = ("loss", "around", "allocated", "reserved", "peak in", "beside full")
    return f"### {model}, {length} tokens\n\n{_table(head, rows)}"


def _neutrality() -> str:
    published = read_json(profiles_path() / "ground_truth" / "published.json")
    rows = [_neutrality_row(row) for row in published if row["source"] == NEUTRALITY]
    head = ("model", "weights", "measured", "chunked-nll", "", "chunked", "")
    return _section("TRL's chunks, measured", _NEUTRALITY, _table(head, rows))


_NEUTRALITY = """\
Runs of TRL 1.13, whose loss was `chunked-nll`, as published
([profiles/ground_truth](../profiles/ground_truth/README.md)); beside it, what the fused
head of TRL 1.16 would take. Only in the quantised run is the peak in the loss: its head
and hidden states are float32, and autocast copies the whole head to bfloat16 for every
chunk."""


def _neutrality_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = parse_size(row["allocated"], "allocated")
    cells = []
    for name in ("chunked-nll", "chunked"):
        keys = row["recipe"] | {"loss": name}
        _, found = _simulate(inspect(row["architecture"]), keys, row["gpu"])
        predicted = _peak(found).allocated_bytes
        cells += [_gib(predicted), f"{predicted / measured - 1:+.2%}"]
    weights = row["recipe"].get("quantization", "bfloat16")
    return row["architecture"], weights, _gib(measured, 2), *cells


def _torchtune() -> str:
    architecture = inspect(TORCHTUNE)
    full, chunked, checkpointed = (
        _peak(_simulate(architecture, TORCHTUNE_RECIPE | keys)[1]).allocated_bytes
        for keys in (
            {"loss": "full"},
            {"loss": "chunked-logits"},
            {"loss": "chunked-logits", "checkpointing": "full"},
        )
    )
    own = dict(_torchtune_terms(architecture.config))
    rows = [
        ("transformers' model, loss `full`", _gib(full), "", ""),
        *((f"+ {name}", _gib(size), "", "") for name, size in own.items()),
        (
            "torchtune's model, its loss over all logits",
            *_judged(full + sum(own.values()), FULL_GIB),
        ),
        ("what chunks save", *_judged(full - chunked, COMPILED_GIB - CHUNKED_GIB)),
        ("chunks, checkpointed", *_judged(checkpointed, CHECKPOINTED_GIB)),
    ]
    subject = f"{TORCHTUNE}, {TORCHTUNE_BATCH} x {TORCHTUNE_LENGTH}"
    table = _table((subject, "GiB", "measured", "error"), rows)
    return _section("torchtune's chunks, measured", _TORCHTUNE, table)


_TORCHTUNE = f"""\
torchtune's README of November 2024 (1814feb17) ablates full fine-tuning on an A100, one
step on top of another, in GiB: packed {FULL_GIB}, compiled {COMPILED_GIB}, chunked
{CHUNKED_GIB}, checkpointed {CHECKPOINTED_GIB}. memplan runs transformers' model; what
torchtune's keeps besides is listed term by term, from its source.

Compiled blocks keep less, which memplan does not simulate, so {COMPILED_GIB} and
{CHUNKED_GIB} cannot be predicted themselves. Their difference can: blocks are the same
in both, and the recipe does not keep what `training.compile_loss` returns, so that the
loss over all logits runs uncompiled, while the one over chunks is compiled in place. In
the checkpointed run, one compiled block at a time is alive, and holds less than the one
predicted."""


def _torchtune_terms(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What torchtune's Llama saves beyond transformers', B T tokens in L layers.

    Source: torchtune.modules.attention (keys and values are expanded to every head) and
    torchtune.models.llama3_1 (positions are looked up anew in every layer).
    """
    tokens = TORCHTUNE_BATCH * TORCHTUNE_LENGTH
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    width = config["head_dim"]
    expanded = heads - config["num_key_value_heads"]
    yield (
        "keys and values for every query head",
        2 * layers * tokens * expanded * width * HALF,
    )
    yield (
        "cosines and sines looked up for queries and for keys",
        2 * layers * tokens * width * FLOAT,
    )
    yield "their table", LONGEST_CONTEXT * width * FLOAT


def _names() -> list[str]:
    """The losses, the model's own first."""
    return sorted(registry.names("losses"), key=lambda name: (name != "full", name))


def _simulate(
    architecture: Architecture, keys: Mapping[str, Any], gpu: str = CARD
) -> tuple[EventLog, Replay]:
    """The events of a fine-tune, and what they come to where memory has no end."""
    recipe = Recipe.from_mapping(keys)
    log = simulator.trace(architecture, recipe, find_gpu(gpu)).log
    return log, replay(log, AllocatorSettings(), None)


def _peak(found: Replay) -> Moment:
    """The worst moment of the training steps."""
    training = (moment for moment in found.moments if moment.in_training)
    return max(training, key=lambda moment: moment.allocated_bytes)


def _most_around_blocks(log: EventLog) -> int:
    """The most bytes after an allocation of the second step outside of all blocks."""
    held = most = 0
    label = ""
    for block, size in log.events:
        if block == MARK:
            label = log.labels[size]
        elif size == FREE:
            held -= log.sizes[block]
        elif block >= 0:
            held += size
            if label in PASSES and not _in_block(log.modules[block]):
                most = max(most, held)
    return most


def _in_block(module: str) -> bool:
    return ".layers." in f".{module}"


def _judged(predicted: int, measured_gib: float) -> tuple[str, str, str]:
    error = predicted / (measured_gib * GIB) - 1
    return _gib(predicted), f"{measured_gib:.1f}", f"{error:+.1%}"


def _gib(num_bytes: int, digits: int = 3) -> str:
    return f"{num_bytes / GIB:.{digits}f}"


def _section(title: str, *parts: str) -> str:
    return "\n\n".join((f"## {title}", *parts))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---" if _is_text(cell) else "--:" for cell in rows[0])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, tuple(rule), *rows))


def _is_text(cell: str) -> bool:
    return any(character.isalpha() for character in cell)


if __name__ == "__main__":
    main()
