"""Simulates fine-tunes by every way to the loss and writes reports/loss_paths.md.

`python reports/make_loss_paths.py` takes about a minute, and no card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan import losses, registry, simulator
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulation import Simulation
from memplan.store import profiles_path, read_json
from memplan.units import GIB, parse_size

REPORT = Path(__file__).with_name("loss_paths.md")

CARD = "A100 80GB"
MODELS = ("meta-llama/Llama-3.1-8B", "google/gemma-2-2b")
LENGTHS = (2048, 8192)
SHARED = {"trainer": "transformers", "checkpointing": "full"}

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
    REPORT.write_text(report())


def report() -> str:
    """The whole report."""
    return (
        "\n\n".join((_INTRODUCTION, _ways(), _sweeps(), _neutrality(), _torchtune()))
        + "\n"
    )


_INTRODUCTION = """# Ways to the loss

What `memplan simulate` says that each `loss` costs, and what public runs say of it.
`python reports/make_loss_paths.py` writes this file. GiB are of 2^30 bytes."""


def _ways() -> str:
    rows = [(f"`{name}`", losses.find(name).summary) for name in _names()]
    return _section("The ways", _table(("loss", "is"), rows)) + (
        "\n\n`full`, `chunked` and `chunked-nll` are traced as their code runs. `liger` "
        "and `cut` are\nTriton kernels: what they allocate is written down from their "
        "source, as is what torch's\ncompiler makes of `chunked-logits`. Of Liger, the "
        "loss alone is meant, none of its layers."
    )


def _sweeps() -> str:
    parts = [_sweep(model, length) for model in MODELS for length in LENGTHS]
    text = (
        f"LoRA of rank 16 on every linear layer in bfloat16, one sequence, every block "
        f"checkpointed,\nTrainer's loop, {CARD}. Where the peak lies in a block, the loss "
        "has no part in it; the\nforward's peak is then what is left of the way's own."
    )
    return _section("By model and length", text) + "\n\n" + "\n\n".join(parts)


def _sweep(model: str, length: int) -> str:
    architecture = inspect(model)
    rows = []
    full_bytes = 0
    for name in _names():
        found = _simulate(
            architecture, SHARED | {"loss": name, "sequence_length": length}
        )
        peak = found.footprint.peak
        full_bytes = full_bytes or peak.allocated_bytes
        rows.append(
            (
                f"`{name}`",
                _gib(peak.allocated_bytes),
                _gib(peak.reserved_bytes),
                _gib(peak.breakdown.get("logits", 0)),
                _place(found),
                _gib(_moment(found, "2.forward")),
                f"{peak.allocated_bytes / full_bytes - 1:+.1%}",
            )
        )
    head = (
        "loss",
        "allocated",
        "reserved",
        "logits",
        "peak is in",
        "forward",
        "beside full",
    )
    return f"### {model}, {length} tokens\n\n{_table(head, rows)}"


def _neutrality() -> str:
    rows = []
    for row in read_json(profiles_path() / "ground_truth" / "published.json"):
        if row["source"] != NEUTRALITY:
            continue
        measured = parse_size(row["allocated"], "allocated")
        predicted = [
            _simulate(
                inspect(row["architecture"]), row["recipe"] | {"loss": name}, row["gpu"]
            ).footprint.peak.allocated_bytes
            for name in ("chunked-nll", "chunked")
        ]
        quantized = row["recipe"].get("quantization", "none")
        rows.append(
            (
                row["architecture"],
                quantized,
                _gib(measured, 2),
                *(
                    cell
                    for n in predicted
                    for cell in (_gib(n), f"{n / measured - 1:+.2%}")
                ),
            )
        )
    head = ("model", "quantization", "measured", "chunked-nll", "", "chunked", "")
    text = """Runs of TRL 1.13, whose loss was `chunked-nll`
([profiles/ground_truth](../profiles/ground_truth/README.md)); beside it what the fused head of
TRL 1.16 would take. Only in the quantised run is the peak in the loss: its head and hidden
states are float32, so that autocast copies the whole head to bfloat16 for every chunk."""
    return _section("TRL's chunks, measured", f"{text}\n\n{_table(head, rows)}")


def _torchtune() -> str:
    architecture = inspect(TORCHTUNE)
    full, chunked, checkpointed = (
        _simulate(architecture, TORCHTUNE_RECIPE | keys).footprint.peak.allocated_bytes
        for keys in (
            {"loss": "full"},
            {"loss": "chunked-logits"},
            {"loss": "chunked-logits", "checkpointing": "full"},
        )
    )
    own = dict(_torchtune_terms(architecture.config))
    expected = full + sum(own.values())
    rows = [
        ("transformers' model, loss `full`", _gib(full), "", ""),
        *((f"+ {name}", _gib(size), "", "") for name, size in own.items()),
        ("torchtune's model, its loss over all logits", *_judged(expected, FULL_GIB)),
        (
            "what chunks save",
            *_judged(full - chunked, COMPILED_GIB - CHUNKED_GIB),
        ),
        ("chunks, checkpointed", *_judged(checkpointed, CHECKPOINTED_GIB)),
    ]
    head = (
        f"{TORCHTUNE}, {TORCHTUNE_BATCH} x {TORCHTUNE_LENGTH}",
        "GiB",
        "measured",
        "error",
    )
    return _section(
        "torchtune's chunks, measured", f"{_TORCHTUNE}\n\n{_table(head, rows)}"
    )


_TORCHTUNE = f"""torchtune's README of November 2024 (1814feb17) ablates full fine-tuning on an A100, each
step on top of the one before: packed {FULL_GIB}, compiled {COMPILED_GIB}, chunked {CHUNKED_GIB}, checkpointed
{CHECKPOINTED_GIB} GiB. memplan runs transformers' model, not torchtune's; what the latter saves besides is
listed term by term, from its source. Its compiler changes what blocks save, which memplan
does not simulate, so {COMPILED_GIB} and {CHUNKED_GIB} cannot be predicted themselves. Their difference can:
blocks are the same in both, and that recipe drops the compiled loss over all logits
(`training.compile_loss(self._loss_fn)`, whose result is not kept), while that of chunks is
compiled in place. The checkpointed run recomputes compiled blocks, which hold less than
those predicted."""


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
) -> Simulation:
    return simulator.run(architecture, Recipe.from_mapping(keys), find_gpu(gpu))


def _moment(found: Simulation, label: str) -> int:
    return next(m.allocated_bytes for m in found.footprint.moments if m.label == label)


def _place(found: Simulation) -> str:
    """Whether the peak was reached in a block or outside of all."""
    module = found.peak_blocks[-1].module
    moment = found.footprint.peak.label.partition(".")[2]
    return f"{moment}, {'a block' if '.layers.' in module else 'the head'}"


def _judged(predicted: int, measured_gib: float) -> tuple[str, str, str]:
    error = predicted / (measured_gib * GIB) - 1
    return _gib(predicted), f"{measured_gib:.1f}", f"{error:+.1%}"


def _gib(num_bytes: int, digits: int = 3) -> str:
    return f"{num_bytes / GIB:.{digits}f}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *("--:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


if __name__ == "__main__":
    main()
