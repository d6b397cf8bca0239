"""Records of `measure_grid.py`, which measures fine-tunes on its own, without memplan.

Its loop drops the model's output at once, `attn: sdpa` is attention auto, and its steps
count from 0. A record holds the allocator's statistics after each phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.importers import Unusable
from memplan.profile import Profile, slug
from memplan.recipe import Recipe

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "none": "none"}
_OPTIMIZERS = {"adamw_torch": "adamw"}
_ATTENTION = {"sdpa": "auto", "eager": "eager"}
_OUTCOMES = {"ok": "ok", "oom": "out-of-memory", "error": "failed"}
_LATER_STEPS = "2"

_PEAKS = {
    "requested_bytes": "requested_peak",
    "active_bytes": "active_peak",
    "inactive_split_bytes": "inactive_split_peak",
    "reserved_end_bytes": "reserved",
    "retries": "alloc_retries",
}


def from_record(number: int, record: Mapping[str, Any]) -> Profile:
    """The run of a record; raises Unusable for what no recipe can say."""
    case, environment = record["case"], record["environment"]
    if "total_memory" not in environment:
        raise Unusable("measured without a card")
    phases = record["phases"]
    footprint = _footprint(record, phases)
    return Profile(
        id=slug(case["id"]),
        source="measure_grid",
        device="cuda",
        model=case["model"],
        config=case["config"],
        recipe=_recipe(case),
        gpu=_gpu(environment, footprint),
        footprint=footprint,
        outcome=_OUTCOMES[record["status"]],
        message=record.get("error", ""),
        counters=_counters(phases),
        driver=_driver(record),
        parameters={
            "total": record.get("n_params", 0),
            "trainable": record.get("n_trainable", 0),
        },
        step_seconds=_step_seconds(phases),
        losses=tuple(filter(math.isfinite, record["losses"])),
        environment=_environment(environment),
        weights="checkpoint" if case["load"] == "pretrained" else "random",
    )


def _recipe(case: Mapping[str, Any]) -> Recipe:
    double = "-double" if case["double_quant"] else ""
    four_bits = case["quant"] in ("nf4", "fp4")
    targets = case["targets"]
    return Recipe(
        method=case["method"],
        rank=case["r"],
        alpha=case["alpha"],
        dropout=case["dropout"],
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank_pattern=case["rank_pattern"] or {},
        trained_modules=tuple(case["modules_to_save"] or ()),
        adapter_dtype="float32" if case["adapter_fp32"] else _DTYPES[case["dtype"]],
        dtype=_DTYPES[case["dtype"]],
        autocast=_DTYPES[case["autocast"]],
        quantization=case["quant"] + (double if four_bits else ""),
        kbit_prepare=case["kbit_prepare"],
        optimizer=_OPTIMIZERS.get(case["optim"], case["optim"].replace("_", "-")),
        max_grad_norm=case["clip"] or None,
        batch_size=case["batch"],
        sequence_length=case["seq"],
        accumulation=case["accum"],
        padded=case["padded"],
        checkpointing="full" if case["ckpt"] else "none",
        reentrant=case["reentrant"],
        attention=_ATTENTION[case["attn"]],
        keep_outputs="none",
    )


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """The allocator's settings are named as memplan's own runs name them."""
    return {
        "allocator" if key == "alloc_conf" else key: value
        for key, value in environment.items()
        if isinstance(value, str)
    }


def _gpu(environment: Mapping[str, Any], footprint: Footprint | None) -> Gpu:
    """The card as torch saw it; its speed is the catalog's where that knows it."""
    major, minor = environment["capability"].split(".")
    context_bytes = None if footprint is None else footprint.context_bytes
    if context_bytes is None:
        context_bytes = find_gpu(f"{environment['total_memory']}B").context_bytes
    return Gpu(
        name=environment["gpu"],
        capacity_bytes=environment["total_memory"],
        context_bytes=context_bytes,
        compute_capability=(int(major), int(minor)),
        native_bf16=int(major) >= 8,
    )


def _footprint(
    record: Mapping[str, Any], phases: Iterable[Mapping[str, Any]]
) -> Footprint | None:
    moments: dict[str, Moment] = {}
    last = ""
    for row in phases:
        last = _label(row["phase"])
        moment = _moment(last, row)
        moments[last] = moments[last].merged(moment) if last in moments else moment
    if not moments:
        return None
    failed = record["status"] != "ok"
    return Footprint(
        moments=tuple(moments.values()),
        context_bytes=_context(record),
        failed_moment=last if failed else None,
    )


def _moment(label: str, row: Mapping[str, Any]) -> Moment:
    return Moment(
        label=label,
        allocated_bytes=row["allocated_peak"],
        reserved_bytes=row["reserved_peak"],
        end_allocated_bytes=row["allocated"],
    )


def _label(phase: str) -> str:
    """`0.forward` is the first step; a step's gradients are dropped with its end."""
    step, dot, name = phase.partition(".")
    if not dot:
        return phase
    number = "1" if step == "0" else _LATER_STEPS
    return f"{number}.{'optimizer' if name == 'zero_grad' else name}"


def _context(record: Mapping[str, Any]) -> int | None:
    """What the driver counts beyond the allocator, for the first case of a process.

    Later ones find the modules of earlier ones loaded, and their paged state, which
    bitsandbytes never frees. The card was this process's alone.
    """
    used, final = record.get("driver_used_end"), record.get("final")
    if used is None or not final or record["case"]["optim"].startswith("paged"):
        return None
    fresh = record["environment"].get("driver_used_context")
    if fresh is not None and record.get("driver_used_before") != fresh:
        return None
    return int(used - final["reserved"])


def _driver(record: Mapping[str, Any]) -> dict[str, int]:
    readings = {
        "card_used_bytes": record.get("driver_used_end"),
        "card_used_before_bytes": record.get("driver_used_before"),
    }
    return {name: value for name, value in readings.items() if value is not None}


def _counters(phases: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for row in phases:
        counters = found.setdefault(_label(row["phase"]), {})
        for name, key in _PEAKS.items():
            counters[name] = max(counters.get(name, 0), row[key])
        counters["microseconds"] = counters.get("microseconds", 0) + round(
            row["seconds"] * 1e6
        )
    return found


def _step_seconds(phases: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    seconds: dict[str, float] = {}
    for row in phases:
        step, dot, _ = row["phase"].partition(".")
        if dot:
            seconds[step] = seconds.get(step, 0.0) + row["seconds"]
    return tuple(round(value, 4) for value in seconds.values())
