"""Does it matter where the rank goes? A paired comparison at equal adapter bytes.

`python tests/benchmarks/benchmark_ranks.py` writes reports/benchmark_ranks.md, in some
minutes of one core. A small byte-level Llama is trained from scratch on the standard
library's documentation topics, the weights of its blocks are rounded to NF4 as QLoRA
stores them, and it is tuned on the standard library's source through PEFT's patterns.

The measure was settled before the first run: held-out loss after the last step, less
that of rank 8 everywhere with the same seed of adapters and of the order of batches;
its mean over the seeds, with the 95 % interval of Student's t.
"""

from __future__ import annotations

import platform
import pydoc_data.topics
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from scipy.stats import t as student
from torch import Tensor, nn

from memplan.architecture import Architecture, Linear
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.planner.modules import Group, adapted_linears, group, with_ranks
from memplan.planner.solver import Problem, solve_lagrangian
from memplan.planner.value import explained_variance, priors
from memplan.planner.value.robust import solve_robust
from memplan.recipe import Recipe
from memplan.reporters.json import versions
from memplan.training import model as training_model
from memplan.training.layer_inputs import input_spectra

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RANKS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24)
BUDGET_RANK = 8
RECIPE = Recipe(rank=BUDGET_RANK, dtype="float32")
BYTES_PER_PARAMETER = 16

EQUAL_RANKS = "per-parameter"
"""The prior by which equal ranks are best."""

HALVED = "uniform r=4"
MATERIAL_SHARE = 0.1
"""A prior's gain counts from this share of what halving every rank loses."""
"""A float32 adapter with its gradient and AdamW's two moments."""

REPORT = Path(__file__).parents[2] / "reports" / "benchmark_ranks.md"
FOUND_FIRST = "uniform r=8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long the comparison is."""

    pretraining_steps: int = 1500
    tuning_steps: int = 120
    seeds: int = 6
    batch: int = 12
    sequence: int = 96
    evaluated: int = 96
    """Held-out sequences."""
    learning_rate: float = 2e-3


def encoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def documentation() -> Tensor:
    """The topics of Python's `help`."""
    return encoded("\n".join(pydoc_data.topics.topics.values()))


def source_code() -> tuple[Tensor, Tensor]:
    """The standard library's modules, shuffled: nine tenths, and the rest."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    random.Random(0).shuffle(files)
    texts = [file.read_text("utf-8", errors="replace") for file in files]
    cut = len(texts) * 9 // 10
    return encoded("\n".join(texts[:cut])), encoded("\n".join(texts[cut:]))


def batches(data: Tensor, size: Size, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random windows of the data, for ever."""
    order = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(
            len(data) - size.sequence, (size.batch,), generator=order
        )
        yield windows(data, starts.tolist(), size)


def windows(data: Tensor, starts: list[int], size: Size) -> dict[str, Tensor]:
    ids = torch.stack([data[start : start + size.sequence] for start in starts])
    return {"input_ids": ids, "labels": ids}


def train(
    model: nn.Module, found: Iterator[dict[str, Tensor]], steps: int, rate: float
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    for _, batch in zip(range(steps), found, strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def held_out_loss(model: nn.Module, data: Tensor, size: Size) -> float:
    spacing = (len(data) - size.sequence) // size.evaluated
    starts = [index * spacing for index in range(size.evaluated)]
    model.eval()
    with torch.no_grad():
        return float(model(**windows(data, starts, size)).loss)


@dataclass(frozen=True, slots=True)
class Base:
    """The pretrained model: what it is made of, and its weights rounded to NF4."""

    architecture: Architecture
    weights: dict[str, Tensor]

    @property
    def linears(self) -> dict[str, Linear]:
        return adapted_linears(self.architecture, RECIPE)

    def built(self) -> nn.Module:
        model = empty_model(self.architecture)
        model.load_state_dict(self.weights)
        return model


def empty_model(architecture: Architecture) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**architecture.config)
    return AutoModelForCausalLM.from_config(config)


def pretrained(size: Size) -> Base:
    architecture = inspect(ModelSource(name="pilot", origin="file", config=CONFIG))
    torch.manual_seed(0)
    model = empty_model(architecture)
    train(model, batches(documentation(), size, 0), size.pretraining_steps, 3e-3)
    base = Base(architecture, {})
    with torch.no_grad():
        for path in base.linears:
            weight = model.get_submodule(path).weight
            codes, state = quantize_4bit(weight.data, blocksize=64, quant_type="nf4")
            weight.copy_(dequantize_4bit(codes, state))
    return Base(architecture, {k: v.clone() for k, v in model.state_dict().items()})


Ranks = dict[str, int]


def posed(groups: tuple[Group, ...], losses: list[list[float]]) -> Problem:
    """The knapsack within the bytes of the budget's rank everywhere."""
    each = [one.parameters_per_rank * BYTES_PER_PARAMETER for one in groups]
    num_bytes = [[[rank * size for rank in RANKS] for size in each]]
    return Problem.of(losses, num_bytes, [BUDGET_RANK * sum(each)])


def prior_losses(groups: tuple[Group, ...], name: str) -> list[list[float]]:
    prior = priors.find(name)
    return [
        [sum(prior.loss(one, rank) for one in held.linears) for rank in RANKS]
        for held in groups
    ]


def solved(groups: tuple[Group, ...], losses: list[list[float]]) -> Ranks:
    choices = solve_lagrangian(posed(groups, losses)).choices
    assert choices is not None
    return spread(groups, choices)


def robust(groups: tuple[Group, ...]) -> Ranks:
    by_prior = {n: np.array(prior_losses(groups, n)) for n in priors.names()}
    problem = posed(groups, prior_losses(groups, "uniform"))
    choices = solve_robust(problem, by_prior, exact=True).solution.choices
    assert choices is not None
    return spread(groups, choices)


def spread(groups: tuple[Group, ...], choices: tuple[int, ...]) -> Ranks:
    return {
        path: RANKS[choice]
        for held, choice in zip(groups, choices, strict=True)
        for path in held.paths
    }


def by_spectra(base: Base, groups: tuple[Group, ...], size: Size) -> Ranks:
    """T2 from 8 batches of what is tuned on."""
    found = batches(source_code()[0], size, 10**6)
    eight = [next(found) for _ in range(8)]
    spectra = input_spectra(base.built(), eight, base.linears)
    paths = [held.paths for held in groups]
    return solved(groups, explained_variance.losses(spectra, paths, RANKS))


def at_random(groups: tuple[Group, ...], seed: int) -> Ranks:
    """The ranks that random losses would have."""
    weights = np.random.default_rng(seed).lognormal(sigma=1.0, size=len(groups))
    losses = [[float(w) / (1 + rank / 8) for rank in RANKS] for w in weights]
    return solved(groups, losses)


def allocations(base: Base, size: Size) -> dict[str, Callable[[int], Ranks]]:
    """By name: the ranks for a seed."""
    linears = base.linears
    groups = group(linears, "by-module")

    def everywhere(rank: int) -> Ranks:
        return dict.fromkeys(linears, rank)

    def halved(kind: str) -> Ranks:
        return {p: 4 if one.kind == kind else 8 for p, one in linears.items()}

    spectral = by_spectra(base, groups, size)
    settled = {
        FOUND_FIRST: everywhere(8),
        "uniform r=16": everywhere(16),
        "uniform r=4": everywhere(4),
        **{
            f"prior {name} =B8": solved(groups, prior_losses(groups, name))
            for name in priors.names()
        },
        "robust over the priors =B8": robust(groups),
        "explained variance per byte =B8": spectral,
        "attention halved": halved("attention"),
        "MLP halved": halved("mlp"),
    }
    fixed = {name: (lambda seed, r=ranks: r) for name, ranks in settled.items()}
    return {**fixed, "random =B8": lambda seed: at_random(groups, seed)}


def tuned_loss(base: Base, ranks: Ranks, seed: int, size: Size) -> tuple[float, int]:
    """Held-out loss after tuning, and the parameters that were trained."""
    tuning, held_out = source_code()
    recipe = with_ranks(RECIPE, ranks)
    model = base.built()
    torch.manual_seed(seed)
    adapted = training_model.adapt(model, base.architecture, recipe)
    for path, rank in ranks.items():
        installed = adapted.get_submodule(f"base_model.model.{path}")
        assert installed.r["default"] == rank
        assert installed.scaling["default"] == RECIPE.alpha / RECIPE.rank
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    found = batches(tuning, size, 1000 + seed)
    train(adapted, found, size.tuning_steps, size.learning_rate)
    return held_out_loss(adapted, held_out, size), count


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An allocation: its losses by seed, beside those of rank 8 everywhere."""

    name: str
    parameters: float
    losses: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean difference."""
        count = len(self.differences)
        deviation = statistics.stdev(self.differences)
        return float(student.ppf(0.975, count - 1)) * deviation / count**0.5

    @property
    def verdict(self) -> str:
        difference = statistics.mean(self.differences)
        if abs(difference) <= self.half_width or self.half_width == 0:
            return "no difference shown"
        return "worse" if difference > 0 else "better"


def compare(size: Size, only: tuple[str, ...] = ()) -> list[Row]:
    """Every allocation, or those named, on every seed."""
    base = pretrained(size)
    first: tuple[float, ...] = ()
    rows = []
    for name, ranks_for in allocations(base, size).items():
        if only and name not in only:
            continue
        found = [tuned_loss(base, ranks_for(s), s, size) for s in range(size.seeds)]
        losses, counts = zip(*found, strict=True)
        first = first or losses
        pairs = zip(losses, first, strict=True)
        differences = tuple(loss - other for loss, other in pairs)
        rows.append(
            Row(
                name=name,
                parameters=statistics.mean(counts),
                losses=losses,
                differences=differences,
            )
        )
    return rows


HEADER = """\
# Does it matter where the rank goes?

`python tests/benchmarks/benchmark_ranks.py` writes this file. A byte-level Llama of
{parameters:,} parameters (3 layers), trained {pretraining_steps} steps on the standard
library's documentation topics, its linear layers rounded to NF4, then tuned
{tuning_steps} steps on the standard library's source through PEFT's `rank_pattern` and
`alpha_pattern` (alpha / r = 2 everywhere). Loss is that of held-out modules, in nats a
byte. {seeds} seeds, paired: a seed is the adapters' start and the order of batches.
"=B8" has at most the adapter bytes of rank 8 everywhere. The difference is to rank 8
everywhere at the same seed, with its 95 % interval (Student's t); negative is better.

| allocation | parameters | mean loss | difference | 95 % interval | |
|---|--:|--:|--:|--:|---|
"""


def report(rows: list[Row], size: Size, seconds: float) -> str:
    architecture = inspect(ModelSource(name="pilot", origin="file", config=CONFIG))
    text = HEADER.format(
        parameters=architecture.total_parameters,
        pretraining_steps=size.pretraining_steps,
        tuning_steps=size.tuning_steps,
        seeds=size.seeds,
    )
    for row in sorted(rows, key=lambda row: statistics.mean(row.losses)):
        difference = statistics.mean(row.differences)
        interval = f"± {row.half_width:.4f}" if row.name != FOUND_FIRST else ""
        verdict = row.verdict if row.name != FOUND_FIRST else "the reference"
        text += (
            f"| {row.name} | {row.parameters:,.0f} | "
            f"{statistics.mean(row.losses):.4f} | {difference:+.4f} | {interval} | "
            f"{verdict} |\n"
        )
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    made = f"{seconds:.0f} s of one core, Python {platform.python_version()}, {named}."
    return f"{text}\n{conclusion(rows)}\n\n{made}\n"


def default_prior(found: Mapping[str, tuple[float, float]]) -> str:
    """The prior that plans go by, of mean differences with their half intervals.

    Equal ranks, unless another prior's whole interval lies beyond a material gain; then
    the one of the largest gain.
    """
    material = MATERIAL_SHARE * found[HALVED][0]
    gains = {
        name: -(found[f"prior {name} =B8"][0] + found[f"prior {name} =B8"][1])
        for name in priors.names()
        if f"prior {name} =B8" in found
    }
    best = max(gains, key=lambda name: gains[name])
    return best if gains[best] > material else EQUAL_RANKS


def decision(found: Mapping[str, tuple[float, float]]) -> str:
    """What follows for the default prior, in a sentence."""
    return (
        f"So the default prior is {default_prior(found)}: equal ranks, unless the "
        f"interval of another lies wholly beyond {MATERIAL_SHARE:.0%} of what halving "
        "every rank loses."
    )


def conclusion(rows: list[Row]) -> str:
    """What the table shows of allocations at equal bytes, in a sentence."""
    found = {
        row.name: (statistics.mean(row.differences), row.half_width) for row in rows
    }
    equal = [row for row in rows if row.name.endswith("=B8")]
    by_verdict = {
        word: [row.name.removesuffix(" =B8") for row in equal if row.verdict == word]
        for word in ("better", "worse", "no difference shown")
    }
    said = [
        f"{word}: {', '.join(names)}" for word, names in by_verdict.items() if names
    ]
    return (
        "At equal bytes, beside rank 8 everywhere, "
        + "; ".join(said)
        + ". A model this small says nothing of a large one; it is what memplan can "
        f"measure of its own priors without a GPU. {decision(found)}"
    )


def main() -> None:
    torch.set_num_threads(1)
    size = Size()
    start = time.process_time()
    rows = compare(size)
    REPORT.write_text(report(rows, size, time.process_time() - start))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
