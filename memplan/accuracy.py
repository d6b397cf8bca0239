"""Measured runs beside what is predicted for them: how far, and for what reason.

Each reading is compared with its own kind, and groups of runs are never pooled over
cards, methods or quantisations. Runs on a CPU are compared with the simulation for one.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import importers, results, runs
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.catalog import architecture_of, inspect
from memplan.errors import InputError, MissingExtraError
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.inference import Inference
from memplan.life import NO_LIFE
from memplan.model_source import ModelSource, catalog_names
from memplan.profile import Profile
from memplan.recipe import Recipe
from memplan.residuals import Residual
from memplan.simulation import Simulation
from memplan.store import profiles_path, write_json

READINGS = ("allocated", "reserved", "device")
"""What is compared, each for itself; memplan's README says what they are."""

TRAINING = "training"
"""The moment of runs whose steps were read as one."""

STEP = "step"
"""Ends the label of a moment that stands for all of a step."""

UNEXPLAINED = 0.01
"""The share of a peak up to which no reason is looked for."""

TERMS = ("weights", "adapters", "optimizer", "activations", "cache", "context")
"""What a footprint can be taken apart into by readings at moments' ends alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run to be predicted: the model it was of, and where it ran."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu | None
    """None on a CPU."""
    inference: Inference | None = None
    """What ran in the place of training, if anything did."""
    settings: AllocatorSettings = dataclasses.field(default_factory=AllocatorSettings)
    """Those of torch's allocator."""


Predictor = Callable[[Case], Footprint]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A run beside one way's prediction of it."""

    run: Profile
    way: str
    """`simulate`, or another of the predictors."""
    predicted: Mapping[str, int]
    """By reading; those alone that the run has."""
    measured: Mapping[str, int]
    predicted_fits: bool | None
    """Whether the prediction says that the card suffices; None on a CPU."""

    @property
    def errors(self) -> dict[str, float]:
        """By reading: (predicted - measured) / measured."""
        return {
            reading: self.predicted[reading] / self.measured[reading] - 1
            for reading in self.measured
        }

    @property
    def worst(self) -> float:
        """The size of the largest error."""
        return max(map(abs, self.errors.values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """The comparison as it is printed."""
        run = self.run
        return {
            "id": run.id,
            "source": run.source,
            "card": run.card,
            "model": run.model,
            "method": run.recipe.method,
            "quantization": run.recipe.quantization,
            "outcome": run.outcome,
            "way": self.way,
            "predicted": dict(self.predicted),
            "measured": dict(self.measured),
            "errors": self.errors,
            "predicted_fits": self.predicted_fits,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The errors of one reading over runs of one kind."""

    reading: str
    way: str
    source: str
    card: str
    method: str
    quantization: str
    errors: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the errors' sizes."""
        return statistics.median(map(abs, self.errors))

    @property
    def bias(self) -> float:
        """The median error, with its sign."""
        return statistics.median(self.errors)

    @property
    def worst(self) -> float:
        """The error of the largest size, with its sign."""
        return max(self.errors, key=abs)

    def to_json(self) -> dict[str, Any]:
        """The group as it is printed."""
        return {
            "reading": self.reading,
            "way": self.way,
            "source": self.source,
            "card": self.card,
            "method": self.method,
            "quantization": self.quantization,
            "count": len(self.errors),
            "median_error": self.median,
            "median_signed_error": self.bias,
            "worst_error": self.worst,
        }


def predictors(versions: Mapping[str, str]) -> dict[str, Predictor]:
    """The ways to predict a run, by name; `versions` tell kept results apart."""
    return {
        "simulate": lambda case: simulated(case, versions).footprint,
        "estimate": estimated,
    }


def predictors_of(run: Profile, versions: Mapping[str, str]) -> dict[str, Predictor]:
    """The ways to predict that run.

    The estimate is of cards alone, and of the allocator as it is by default.
    """
    ways = predictors(versions)
    estimable = run.gpu is not None and not run.environment.get("allocator")
    return ways if estimable else {"simulate": ways["simulate"]}


def estimated(case: Case) -> Footprint:
    """The estimate of a case on a card."""
    from memplan import estimator
    from memplan.estimator import inference

    if case.inference is not None:
        parts = case.architecture, case.recipe, case.inference, case.gpu
        return inference.run(*parts).footprint
    return estimator.estimate(case.architecture, case.recipe, case.gpu)


def simulated(case: Case, versions: Mapping[str, str]) -> Simulation:
    """The simulation of a case, as it was kept from an earlier run or run now."""
    inputs: dict[str, Any] = {
        "architecture": case.architecture.to_json(),
        "recipe": case.recipe.to_json(),
        "gpu": None if case.gpu is None else case.gpu.to_json(),
        "allocator": dataclasses.asdict(case.settings),
        "life": dataclasses.asdict(NO_LIFE),
        "inference": case.inference and dataclasses.asdict(case.inference),
    }
    if case.gpu is None:
        inputs["device"] = "cpu"
    name = results.key(inputs, versions)
    known = results.load(name)
    if known is not None:
        return known
    found = _simulate_now(case)
    results.keep(name, found)
    return found


def _simulate_now(case: Case) -> Simulation:
    try:
        from memplan import simulator
    except ModuleNotFoundError as error:
        needed_for = "simulating measured runs"
        raise MissingExtraError(needed_for, error.name or "torch", "torch") from error
    asked = case.inference
    if case.gpu is not None:
        if asked is not None:
            from memplan.simulator import inference

            return inference.run(
                case.architecture, case.recipe, asked, case.gpu, case.settings
            )
        return simulator.run(case.architecture, case.recipe, case.gpu, case.settings)
    from memplan.simulator.cpu import simulate_inference_on_cpu, simulate_on_cpu

    if asked is not None:
        footprint = simulate_inference_on_cpu(case.architecture, case.recipe, asked)
    else:
        footprint = simulate_on_cpu(case.architecture, case.recipe)
    return Simulation(
        footprint=footprint,
        total_parameters=case.architecture.total_parameters,
        trainable_parameters=0,
        peak_blocks=(),
    )


def known_runs(working_folder: Path) -> tuple[Profile, ...]:
    """The runs that memplan carries, and those of the working folder."""
    shipped = profiles_path()
    ground_truth = [
        importers.read(shipped / "ground_truth" / name).runs
        for name in ("t4_runs.json", "published.json")
    ]
    kept = [runs.load(shipped / "runs"), runs.load(working_folder)]
    found = {run.id: run for group in (*ground_truth, *kept) for run in group}
    return tuple(found.values())


def case_of(run: Profile) -> Case:
    """What is to be predicted of a run.

    The card's context is the catalog's and not the measured one, so that what is
    predicted of the device is what would have been said beforehand.
    """
    return Case(
        architecture=architecture_of_run(run),
        recipe=run.recipe,
        gpu=None if run.gpu is None else _planned(run.gpu),
        inference=run.inference,
        settings=AllocatorSettings.parse(run.environment.get("allocator", "")),
    )


def architecture_of_run(run: Profile) -> Architecture:
    """What a run's model was made of."""
    if run.config is None:
        return inspect(run.model)
    if run.model in catalog_names():
        found = inspect(run.model)
        return dataclasses.replace(found, config=dict(run.config))
    source = ModelSource(name=run.model, origin="file", config=dict(run.config))
    return architecture_of(source)


def compare(run: Profile, way: str, predict: Predictor) -> Comparison:
    """A run beside a prediction; raises InputError where it cannot be predicted."""
    if run.footprint is None or not _steps_of(run.footprint):
        problem = "has neither training steps nor answers to be compared"
        raise InputError("run", run.id, problem, "compare runs that have")
    case = case_of(run)
    footprint = predict(case)
    measured = _readings(run.footprint, run.footprint) if run.has_measured else {}
    predicted = _readings(footprint, run.footprint)
    return Comparison(
        run=run,
        way=way,
        predicted={reading: predicted[reading] for reading in measured},
        measured=measured,
        predicted_fits=footprint.fits,
    )


def groups_of(comparisons: Iterable[Comparison]) -> tuple[Group, ...]:
    """The errors by reading, way, source, card, method and quantisation."""
    found: dict[tuple[str, ...], list[float]] = {}
    for each in comparisons:
        run, recipe = each.run, each.run.recipe
        for reading, error in each.errors.items():
            kind = (run.source, run.card, recipe.method, recipe.quantization)
            found.setdefault((reading, each.way, *kind), []).append(error)
    names = ("reading", "way", "source", "card", "method", "quantization")
    return tuple(
        Group(**dict(zip(names, key, strict=True)), errors=tuple(errors))
        for key, errors in sorted(found.items(), key=_in_order)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a run's reading has more than a prediction."""

    what: str
    """A moment, such as `2.backward`, or one of TERMS."""
    reading: str
    measured_bytes: int
    predicted_bytes: int

    @property
    def excess_bytes(self) -> int:
        """Measured less predicted."""
        return self.measured_bytes - self.predicted_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A difference in what was done that would bring a prediction nearer to a run."""

    what: str
    remaining_bytes: int
    """By how much the peak would then still differ, measured less predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """A run beside a prediction: where they differ, and what would explain it."""

    comparison: Comparison
    differences: Sequence[Difference]
    explanations: Sequence[Explanation]


def explain(
    run: Profile, way: str, predict: Predictor, progress: Callable[[str], None]
) -> Explained:
    """Where a run differs from a prediction.

    Where it is more than 1 % and the simulation's, reasons are looked for.

    Raises InputError for a run that has nothing to compare.
    """
    comparison = compare(run, way, predict)
    assert run.footprint is not None
    off = abs(comparison.errors.get("allocated", 0.0)) > UNEXPLAINED
    beyond = off and way == "simulate"
    return Explained(
        comparison=comparison,
        differences=differences(run.footprint, predict(case_of(run))),
        explanations=explanations(run, predict, progress) if beyond else (),
    )


def differences(measured: Footprint, predicted: Footprint) -> list[Difference]:
    """Measured minus predicted, term by term and moment by moment, largest first."""
    found = [*_by_term(measured, predicted), *_by_moment(measured, predicted)]
    return sorted(found, key=lambda each: -abs(each.excess_bytes))


HYPOTHESES: Sequence[tuple[str, Mapping[str, Any]]] = (
    (
        "the output, with its logits, was kept through backward",
        {"keep_outputs": "backward"},
    ),
    ("the output was kept until the next step", {"keep_outputs": "step"}),
    ("the output was dropped before backward", {"keep_outputs": "none"}),
    ("autocast was off", {"autocast": "none"}),
    ("autocast to bfloat16 was on, with its copies", {"autocast": "bfloat16"}),
    ("autocast to float16 was on, with its copies", {"autocast": "float16"}),
    ("the adapters were in bfloat16", {"adapter_dtype": "bfloat16"}),
    ("the adapters were in float32", {"adapter_dtype": "float32"}),
    ("k-bit preparation did not run, with its casts", {"kbit_prepare": False}),
    ("k-bit preparation ran, with its casts to float32", {"kbit_prepare": True}),
    ("attention was computed by the eager path", {"attention": "eager"}),
    ("attention was computed by PyTorch's math path", {"attention": "math"}),
    (
        "attention was computed by the memory-efficient kernel",
        {"attention": "efficient"},
    ),
    ("attention was computed by the flash kernel", {"attention": "flash"}),
    ("a mask was made, as for padded batches", {"padded": True}),
    ("blocks were not checkpointed", {"checkpointing": "none"}),
    ("blocks were checkpointed", {"checkpointing": "full"}),
    ("the optimizer was fused, without temporaries", {"optimizer": "adamw-fused"}),
)
"""What may have been done otherwise than the recipe says: trainers' casts and autocast,
outputs kept, another kernel."""


def explanations(
    run: Profile, predict: Predictor, progress: Callable[[str], None]
) -> list[Explanation]:
    """What would halve the difference of the allocated peak at least, best first.

    The last may be a longer batch, by how activations grow with tokens.
    """
    assert run.footprint is not None
    case = case_of(run)
    measured = _readings(run.footprint, run.footprint)["allocated"]

    def remaining(recipe: Recipe) -> int:
        footprint = predict(dataclasses.replace(case, recipe=recipe))
        assert run.footprint is not None
        return measured - _readings(footprint, run.footprint)["allocated"]

    now = remaining(run.recipe)
    found: list[Explanation] = []
    for what, changes in HYPOTHESES:
        recipe = dataclasses.replace(run.recipe, **changes)
        if recipe == run.recipe or not _is_plausible(run.recipe, changes):
            continue
        progress(what)
        try:
            left = remaining(recipe)
        except InputError:
            continue
        if abs(left) <= abs(now) / 2:
            found.append(Explanation(what=what, remaining_bytes=left))
    longer = _longer_batch(run, now, remaining)
    if longer is not None:
        found.append(longer)
    return sorted(found, key=lambda each: abs(each.remaining_bytes))


def write_residuals(comparisons: Iterable[Comparison], file: Path) -> None:
    """Writes what is kept of comparisons into a file."""
    kept = filter(None, map(_residual, comparisons))
    write_json(file, [dataclasses.asdict(one) for one in kept])


def _residual(comparison: Comparison) -> Residual | None:
    """What is kept of a comparison; None for runs without a card or readings."""
    run = comparison.run
    if run.gpu is None or not comparison.errors:
        return None
    return Residual(
        id=run.id,
        way=comparison.way,
        device=run.device,
        compute_capability=run.gpu.compute_capability,
        method=run.recipe.method,
        quantization=run.recipe.quantization,
        errors={name: round(e, 6) for name, e in comparison.errors.items()},
    )


def _steps_of(footprint: Footprint) -> set[str]:
    """`1` and `2` for the steps that were read; `training` for all of them as one.

    Of inference, its moments.
    """
    steps = {m.label.partition(".")[0] for m in footprint.moments if m.counts}
    return steps or {m.label for m in footprint.moments if m.label == TRAINING}


def _readings(footprint: Footprint, measured: Footprint) -> dict[str, int]:
    """The peaks over the steps that a run was read in; those that it has."""
    steps = _steps_of(measured)
    moments = [
        moment
        for moment in footprint.moments
        if moment.label.partition(".")[0] in steps
        or (steps == {TRAINING} and (moment.in_training or moment.label == TRAINING))
    ]
    allocated = max(moment.allocated_bytes for moment in moments)
    reserved = max(moment.reserved_bytes for moment in moments)
    found = {"allocated": allocated, "reserved": reserved}
    if footprint.context_bytes is not None and reserved:
        found["device"] = reserved + footprint.context_bytes + footprint.paged_bytes
    return {reading: size for reading, size in found.items() if size}


def _planned(gpu: Gpu) -> Gpu:
    """The card with the context that the catalog plans for one of its name."""
    try:
        planned = find_gpu(gpu.name).context_bytes
    except InputError:
        planned = find_gpu(f"{gpu.capacity_bytes}B").context_bytes
    return dataclasses.replace(gpu, context_bytes=planned)


def _in_order(item: tuple[tuple[str, ...], list[float]]) -> tuple[Any, ...]:
    reading, *others = item[0]
    return (READINGS.index(reading), *others)


def _by_term(measured: Footprint, predicted: Footprint) -> Iterator[Difference]:
    ours, theirs = _terms(predicted), _terms(measured)
    for term in TERMS:
        if term in ours and term in theirs:
            yield Difference(
                what=term,
                reading="term",
                measured_bytes=theirs[term],
                predicted_bytes=ours[term],
            )


def _terms(footprint: Footprint) -> dict[str, int]:
    """A footprint taken apart by what is held at its moments' ends.

    weights: after the load. adapters: what adapting adds, casts included. optimizer:
    what the first step leaves. activations: the peak beyond what was held before.
    """
    ends = {m.label: m.end_allocated_bytes for m in footprint.moments}
    found: dict[str, int] = {}
    if ends.get("load"):
        found["weights"] = ends["load"]
    if ends.get("load") and ends.get("adapt"):
        found["adapters"] = ends["adapt"] - ends["load"]
    if ends.get("adapt") and ends.get("1.optimizer"):
        found["optimizer"] = ends["1.optimizer"] - ends["adapt"]
        found["activations"] = footprint.peak.allocated_bytes - ends["1.optimizer"]
    peak = footprint.peak
    if peak.reserved_bytes:
        found["cache"] = peak.reserved_bytes - peak.allocated_bytes
    if footprint.context_bytes is not None:
        found["context"] = footprint.context_bytes
    return found


def _by_moment(measured: Footprint, predicted: Footprint) -> Iterator[Difference]:
    ours = {moment.label: moment for moment in predicted.moments}
    for moment in measured.moments:
        one = ours.get(moment.label) or _whole(moment.label, predicted)
        if one is None:
            continue
        for reading in ("allocated_bytes", "reserved_bytes", "end_allocated_bytes"):
            read: int = getattr(moment, reading)
            if read and getattr(one, reading):
                yield Difference(
                    what=moment.label,
                    reading=reading.removesuffix("_bytes").replace("_", " "),
                    measured_bytes=read,
                    predicted_bytes=getattr(one, reading),
                )


def _whole(label: str, predicted: Footprint) -> Moment | None:
    """The predicted moments that one stands for which is a whole step, or all."""
    step, _, phase = label.partition(".")
    if label != TRAINING and phase != STEP:
        return None
    parts = [
        moment
        for moment in predicted.moments
        if moment.in_training
        and (label == TRAINING or moment.label.startswith(f"{step}."))
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole


def _is_plausible(recipe: Recipe, changes: Mapping[str, Any]) -> bool:
    """Whether a hypothesis says something of such a recipe at all."""
    if "kbit_prepare" in changes:
        return recipe.quantization != "none"
    if "adapter_dtype" in changes:
        return recipe.method != "full"
    if "optimizer" in changes:
        return recipe.optimizer == "adamw"
    return True


def _longer_batch(
    run: Profile, excess: int, remaining: Callable[[Recipe], int]
) -> Explanation | None:
    """The sequence length whose batch would take what was measured, if it is longer.

    The peak is taken to grow in a line between this length and twice it.
    """
    if excess <= 0:
        return None
    length = run.recipe.sequence_length
    try:
        doubled = remaining(dataclasses.replace(run.recipe, sequence_length=2 * length))
    except InputError:
        return None
    per_token = (excess - doubled) / length
    if per_token <= 0:
        return None
    longest = length + round(excess / per_token)
    return Explanation(
        what=f"the longest sequences had about {longest} tokens instead of {length}",
        remaining_bytes=0,
    )
