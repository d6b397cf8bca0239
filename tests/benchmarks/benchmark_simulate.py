"""Times `memplan simulate`, alone and beside torch's own memory tracker.

`python tests/benchmarks/benchmark_simulate.py` writes reports/benchmark_simulate.md; it
takes some minutes. Each figure is the median of three processes of its own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memplan import results

REPORT = Path(__file__).parents[2] / "reports" / "benchmark_simulate.md"

REPEATS = 3
MODEL = "meta-llama/Llama-2-7b-hf"
QLORA = ("--quantization", "nf4-double", "--checkpointing", "full")
COMMAND = ("-m", "memplan", "simulate", MODEL, *QLORA)
STEPS = 2
"""What `memplan simulate` runs: the first step makes the optimizer's state."""

OWN_SECONDS = 5
"""CPU seconds that the command may take beyond its imports."""

LARGEST_RESIDENT_BYTES = 1.5e9

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a process took."""

    cpu_seconds: float
    """User and system time, of all threads."""
    elapsed_seconds: float
    resident_bytes: int
    """The most memory it held at once."""

    @classmethod
    def median(cls, costs: Sequence[Cost]) -> Cost:
        """Field by field."""
        return cls(
            cpu_seconds=statistics.median(cost.cpu_seconds for cost in costs),
            elapsed_seconds=statistics.median(cost.elapsed_seconds for cost in costs),
            resident_bytes=statistics.median_low(cost.resident_bytes for cost in costs),
        )


def whole_process(arguments: Sequence[str], cache: str = "off") -> Cost:
    """What a Python process takes from its start to its end; `cache` keeps results."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, results.ENVIRONMENT: cache},
    )
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{arguments} exits with {process.returncode}")
    return Cost(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        elapsed_seconds=elapsed,
        resident_bytes=_resident_bytes(usage),
    )


def part(name: str) -> dict[str, Any]:
    """What a process of its own prints that runs that one of PARTS."""
    done = subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def imports() -> dict[str, Any]:
    """Everything the command imports, as it imports it, and nothing else."""
    from memplan.commands.options import without_compiler
    from memplan.commands.simulate import import_simulator
    from memplan.recipe import Recipe

    with without_compiler():
        import_simulator(Recipe())
    return {}


def simulate_full() -> dict[str, Any]:
    """A full fine-tune by memplan: load, two steps, replay."""
    imports()
    from memplan import simulator
    from memplan.catalog import inspect
    from memplan.recipe import Recipe

    architecture, recipe = inspect(MODEL), Recipe(method="full")
    with _timed() as cost:
        footprint = simulator.simulate(architecture, recipe)
    return cost | {"peak_bytes": footprint.peak.allocated_bytes}


def simulate_full_whole() -> dict[str, Any]:
    """The same, with every layer traced instead of some for those that are alike."""
    imports()
    from memplan import simulator
    from memplan.allocator import AllocatorSettings
    from memplan.catalog import inspect
    from memplan.gpu import find_gpu
    from memplan.recipe import Recipe
    from memplan.simulator.replay import replay

    architecture, recipe = inspect(MODEL), Recipe(method="full")
    gpu = find_gpu(simulator.UNNAMED_CARD)
    with _timed() as cost:
        log = simulator.trace(architecture, recipe, gpu, whole=True).log
        moments = replay(log, AllocatorSettings(), None).moments
    steps = [moment.allocated_bytes for moment in moments if moment.in_training]
    return cost | {"peak_bytes": max(steps)}


def track_full() -> dict[str, Any]:
    """The same fine-tune by MemTracker over fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = _model(_config())
        with _timed() as cost:
            peak_bytes = _track(model, tokens=512)
    return cost | {"peak_bytes": peak_bytes}


def track_adapted() -> dict[str, Any]:
    """What MemTracker says to a small model with PEFT's adapters."""
    import peft

    config = _config(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        _track(peft.get_peft_model(_model(config), lora), tokens=16)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        imports,
        simulate_full,
        simulate_full_whole,
        track_full,
        track_adapted,
    )
}


class _timed:  # noqa: N801 - read as a verb
    """A dictionary that holds the CPU and the elapsed seconds of its block."""

    def __enter__(self) -> dict[str, Any]:
        self._began = time.process_time(), time.perf_counter()
        self._cost: dict[str, Any] = {}
        return self._cost

    def __exit__(self, *error: object) -> None:
        cpu, elapsed = self._began
        self._cost["cpu_seconds"] = time.process_time() - cpu
        self._cost["elapsed_seconds"] = time.perf_counter() - elapsed
        self._cost["resident_bytes"] = _resident_bytes(
            resource.getrusage(resource.RUSAGE_SELF)
        )


def _resident_bytes(usage: resource.struct_rusage) -> int:
    """Linux counts in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _config(**changes: Any) -> Any:
    from memplan.catalog import inspect
    from memplan.inspector import build_config
    from memplan.model_source import ModelSource

    config = {**inspect(MODEL).config, **changes}
    built = build_config(ModelSource(name=MODEL, origin="catalog", config=config))
    built.use_cache = False
    return built


def _model(config: Any) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _track(model: Any, tokens: int) -> int:
    """The peak that MemTracker finds in two steps of AdamW."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    peak_bytes = 0
    with tracker:
        for _ in range(STEPS):
            batch = torch.zeros((1, tokens), dtype=torch.int64)
            # Held through the step, as memplan's plain loop does.
            outputs = model(input_ids=batch, labels=batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
            del outputs
    for snapshot in tracker.get_tracker_snapshot("peak").values():
        peak_bytes += snapshot["Total"]
    return peak_bytes


def report() -> str:
    """The report, from figures measured now."""
    names = ("simulate_full", "simulate_full_whole", "track_full")
    in_command: list[Cost] = []
    in_imports: list[Cost] = []
    others: dict[str, list[Cost]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for _ in range(REPEATS):
        in_imports.append(whole_process((__file__, "imports")))
        in_command.append(whole_process(COMMAND))
        for name in names:
            found = part(name)
            peaks[name] = found.pop("peak_bytes")
            others[name].append(Cost(**found))
    medians = {name: Cost.median(costs) for name, costs in others.items()}
    return "\n".join(
        (
            _introduction(),
            _command_table(
                Cost.median(in_command), Cost.median(in_imports), _from_cache()
            ),
            _tracker_table(medians, peaks, part("track_adapted")["error"]),
        )
    )


def _from_cache() -> Cost:
    """What the command takes when it has been run before."""
    with tempfile.TemporaryDirectory() as folder:
        whole_process(COMMAND, cache=folder)
        return Cost.median([whole_process(COMMAND, folder) for _ in range(REPEATS)])


def _introduction() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"""\
# Benchmark: `memplan simulate`

{os.cpu_count()} cores, Python {platform.python_version()}, {libraries}.

Medians of {REPEATS} processes each, taken in turn. CPU is user and system time; elapsed
depends on what else the machine does. `python tests/benchmarks/benchmark_simulate.py`
writes this file.
"""


def _command_table(command: Cost, imported: Cost, kept: Cost) -> str:
    own = command.cpu_seconds - imported.cpu_seconds
    rest = command.elapsed_seconds - imported.elapsed_seconds
    return f"""\
## The whole command

QLoRA of rank 16 on every linear layer, 1 x 512 tokens:

```
memplan simulate {MODEL} {" ".join(QLORA)}
```

| | CPU s | elapsed s |
|---|--:|--:|
| whole command | {command.cpu_seconds:.1f} | {command.elapsed_seconds:.1f} |
| of which Python and imports | {imported.cpu_seconds:.1f} \
| {imported.elapsed_seconds:.1f} |
| of which memplan (bar: {OWN_SECONDS}) | {own:.1f} | {rest:.1f} |
| the same again, from the user's cache | {kept.cpu_seconds:.1f} \
| {kept.elapsed_seconds:.1f} |

Peak resident memory: {command.resident_bytes / 1e9:.2f} GB \
(bar: {LARGEST_RESIDENT_BYTES / 1e9} GB).
"""


def _tracker_table(
    medians: Mapping[str, Cost], peaks: Mapping[str, int], error: str
) -> str:
    titles = {
        "simulate_full": "memplan",
        "simulate_full_whole": "memplan, every layer traced",
        "track_full": "MemTracker",
    }
    own = medians["simulate_full"].cpu_seconds
    rows = (
        f"| {title} | {medians[name].cpu_seconds:.1f} "
        f"| {medians[name].elapsed_seconds:.1f} "
        f"| {medians[name].cpu_seconds / own:.1f} "
        f"| {medians[name].resident_bytes / 1e9:.2f} | {peaks[name]:,} |"
        for name, title in titles.items()
    )
    table = "\n".join(rows)
    return f"""\
## Beside torch's MemTracker

Full fine-tuning of {MODEL} in bfloat16 with AdamW, 1 x 512 tokens,
{STEPS} steps, without the imports. `torch.distributed._tools.mem_tracker.MemTracker`
ran over fake tensors of the CPU: it sees the CPU's operators, no cuBLAS and no
allocator. memplan's time includes the load and the replay through the allocator.

| | CPU s | elapsed s | CPU, memplan = 1 | resident GB | peak, bytes |
|---|--:|--:|--:|--:|--:|
{table}

MemTracker cannot follow a model with frozen parameters. On a two-layer model with
PEFT's adapters, on the CPU, it ends with:

```
{error or "no error"}
```
"""


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(PARTS[sys.argv[1]]()))
        return
    text = report()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
