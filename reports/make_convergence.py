"""Fine-tunes a small model by every method and writes reports/convergence.md.

`python reports/make_convergence.py` takes some minutes on a CPU. A model of two layers
is trained from scratch on bytes of Python's documentation and fine-tuned on bytes of
Python's own source, both of which ship with Python.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memplan import methods, quantizations, registry
from memplan.architecture import Architecture
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.training import model as training_model
from memplan.training.step import Loop, silent
from memplan.training.values import materialize

REPORT = Path(__file__).with_name("convergence.md")

CPU = torch.device("cpu")
BYTES = 256
BATCH, LENGTH = 8, 64
PRETRAINING_STEPS, STEPS = 600, 60
SEEDS = (0, 1, 2)
RATES = (3e-3, 1e-2, 3e-2)
HELD_OUT = 16_384
"""Bytes at the end of a text that are evaluated on."""

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": BYTES,
    "max_position_embeddings": LENGTH,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "qa-lora": {"group_size": 16},
    "adalora": {"total_step": STEPS},
    "adaq-lora": {"total_step": STEPS, "prune_physically": True},
    "peft": {"peft_type": "MISS"},
}

BASES = ("none", "nf4-double")
CALIBRATED = "nf4-icq"
"""The base that IR-QLoRA has in the place of nf4-double."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Losses that a method reached on a base, one a seed, at its best rate."""

    rate: float
    trained: int
    losses: tuple[float, ...]


def main() -> None:
    """Writes the report."""
    torch.set_num_threads(1)
    REPORT.write_text(report())


def report() -> str:
    """The whole report."""
    architecture = inspect(ModelSource(name="small", origin="file", config=CONFIG))
    documentation, source = _documentation(), _source()
    pretrained = _pretrain(architecture, documentation)
    frozen = _loss(pretrained, source)
    parts = [_introduction(documentation, source)]
    for base in BASES:
        results = {
            name: _best(architecture, name, base, pretrained, source)
            for name in _names(base)
        }
        parts.append(_section(base, frozen, results))
    return "\n\n".join(parts) + "\n"


def _names(base: str) -> Iterator[str]:
    for name in registry.names("methods"):
        if base == "none" or methods.find(name).carries_quantized:
            yield name


def _keys(name: str, base: str) -> dict[str, Any]:
    quantization = CALIBRATED if (name, base) == ("ir-qlora", BASES[1]) else base
    return {
        "method": name,
        "rank": 8,
        "dtype": "float32",
        "compute_dtype": "float32",
        "quantization": quantization,
        "method_options": OPTIONS.get(name, {}),
        "batch_size": BATCH,
        "sequence_length": LENGTH,
    }


def _documentation() -> Tensor:
    """Python's help topics, as bytes."""
    from pydoc_data.topics import topics

    return _as_tensor("\n".join(topics[name] for name in sorted(topics)))


def _source() -> Tensor:
    """Modules of the standard library, as bytes."""
    names = ("argparse", "inspect", "typing", "tarfile", "doctest")
    paths = [importlib.util.find_spec(name).origin for name in names]  # type: ignore[union-attr]
    return _as_tensor("\n".join(Path(str(p)).read_text() for p in paths))


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def _pretrain(architecture: Architecture, text: Tensor) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(**_keys("full", "none"))
    model = materialize(training_model.build(architecture, recipe), recipe, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(PRETRAINING_STEPS):
        _backward(model, _batch(text))
        optimizer.step()
        optimizer.zero_grad()
    return model


def _batch(text: Tensor) -> Tensor:
    """Random stretches of what is not held out."""
    starts = torch.randint(0, len(text) - HELD_OUT - LENGTH, (BATCH,))
    return torch.stack([text[start : start + LENGTH] for start in starts])


def _backward(model: Any, batch: Tensor) -> None:
    model(input_ids=batch, labels=batch).loss.backward()


def _model(
    architecture: Architecture, recipe: Recipe, pretrained: nn.Module
) -> nn.Module:
    """The pretrained model, its linear layers stored as the recipe says."""
    scheme = quantizations.find(recipe.quantization)
    model = materialize(training_model.build(architecture, recipe), recipe, CPU)
    given = dict(pretrained.named_modules())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = getattr(given[path], name).detach().clone()
            if parameter.is_floating_point():
                parameter.data = value
            else:
                scheme.fill(module, value)
    return model


def _best(
    architecture: Architecture,
    name: str,
    base: str,
    pretrained: nn.Module,
    text: Tensor,
) -> Result:
    """What all seeds reach at the rate that is best for the first."""

    def tuned(rate: float, seed: int) -> tuple[float, int]:
        return _tune(architecture, _keys(name, base), pretrained, text, rate, seed)

    first = {rate: tuned(rate, SEEDS[0]) for rate in RATES}
    rate = min(first, key=lambda rate: first[rate][0])
    losses = [first[rate][0], *(tuned(rate, seed)[0] for seed in SEEDS[1:])]
    return Result(rate=rate, trained=first[rate][1], losses=tuple(losses))


def _tune(  # noqa: PLR0913 - each is a part of what is run
    architecture: Architecture,
    keys: dict[str, Any],
    pretrained: nn.Module,
    text: Tensor,
    rate: float,
    seed: int,
) -> tuple[float, int]:
    """The held-out loss after a fine-tune, and how many numbers it began to train."""
    torch.manual_seed(seed)
    recipe = Recipe(**keys)
    model = _model(architecture, recipe, pretrained)
    training_model.prepare(model, recipe)
    model = training_model.adapt(model, architecture, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loop = Loop(model, recipe, BYTES, silent)
    method = methods.find(recipe.method)
    factor = rate / loop.optimizer.param_groups[0]["lr"]
    for group in loop.optimizer.param_groups:
        group["lr"] *= factor
    for step in range(1, STEPS + 1):
        _backward(model, _batch(text))
        loop.optimizer.step()
        method.after_step(model, loop.optimizer, step)
        loop.optimizer.zero_grad()
        if recipe.method == "relora" and step == STEPS // 2:
            loop.reach_milestone()
    return _loss(model, text), trained


@torch.no_grad()
def _loss(model: Any, text: Tensor) -> float:
    """The mean loss a byte on what is held out, without any method's own terms."""
    model.eval()
    rows = text[-HELD_OUT:].view(-1, LENGTH)
    logits = model(input_ids=rows).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, BYTES).float(), rows[:, 1:].reshape(-1)
    )
    model.train()
    return float(loss)


def _introduction(documentation: Tensor, source: Tensor) -> str:
    return (
        "# What small fine-tunes reach\n\n"
        "Written by `python reports/make_convergence.py`; a check that every method "
        "learns, and no ranking: a model of two layers says nothing of larger ones.\n\n"
        f"Two layers of width {CONFIG['hidden_size']}, trained for {PRETRAINING_STEPS} "
        f"steps on {len(documentation):,} bytes of Python's help topics, fine-tuned "
        f"for {STEPS} steps of {BATCH} x {LENGTH} bytes on {len(source):,} bytes of "
        "its standard library, AdamW, rank 8. Losses are nats a byte on held-out "
        f"bytes: the mean of {len(SEEDS)} seeds and half their spread, at the best of "
        f"the rates {', '.join(f'{rate:g}' for rate in RATES)} for the first seed. "
        "The rate was chosen by the same held-out bytes, which flatters every method "
        "a little. "
        f"Python {platform.python_version()}, torch {torch.__version__}."
    )


def _section(base: str, frozen: float, results: dict[str, Result]) -> str:
    lines = [
        f"## Base: {base}",
        "",
        f"The frozen model, unquantised: {frozen:.3f}.",
        "",
        "| method | trained | rate | loss | below the frozen model |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, result in results.items():
        mean = statistics.mean(result.losses)
        spread = (max(result.losses) - min(result.losses)) / 2
        lines.append(
            f"| {name} | {result.trained:,} | {result.rate:g} | "
            f"{mean:.3f} ± {spread:.3f} | {frozen - mean:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
