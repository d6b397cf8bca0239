"""What `--help`, `estimate` and `fits` take beside a bare `python -c pass`.

`python tests/benchmarks/benchmark_estimate.py` writes reports/benchmark_estimate.md:
CPU seconds of whole processes, medians of 7 after one that warms files and tapes and
compiles the modules, as installing does, and their ratio to the bare interpreter's in
the same round. It fails where a command has loaded torch, since then a tape was traced.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memplan.reporters.json import versions

BARE = ("-c", "pass")
QLORA = ("--quantization", "nf4-double", "--checkpointing", "full")
COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": BARE,
    "python -c 'import click'": ("-c", "import click"),
    "memplan --help": ("-m", "memplan", "--help"),
    "memplan estimate": (
        *("-m", "memplan", "estimate", "meta-llama/Llama-2-7b-hf", "--gpu", "12GB"),
        *QLORA,
    ),
    "memplan estimate --json": (
        *("-m", "memplan", "estimate", "meta-llama/Llama-2-7b-hf", "--gpu", "12GB"),
        *(*QLORA, "--json"),
    ),
    "memplan fits MODEL": (
        *("-m", "memplan", "fits", "meta-llama/Llama-2-7b-hf", "--gpu", "12GB"),
    ),
    "memplan fits": ("-m", "memplan", "fits", "--gpu", "12GB"),
    "memplan fits --json": ("-m", "memplan", "fits", "--gpu", "12GB", "--json"),
    "memplan fits, 80 GB": ("-m", "memplan", "fits", "--gpu", "80GB"),
}
RUNS = 7
BYTECODE = tempfile.TemporaryDirectory(prefix="memplan-bytecode-")
ENVIRONMENT = {
    **{name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "PYTHONPYCACHEPREFIX": BYTECODE.name,
}
"""Modules are compiled once and for all, as installing compiles them, and not here."""
REPORT = Path(__file__).parents[2] / "reports" / "benchmark_estimate.md"


def seconds(arguments: tuple[str, ...]) -> tuple[float, float]:
    """CPU and wall seconds of a process."""
    command = [sys.executable, *arguments]
    before, started = cpu_seconds(), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
    return cpu_seconds() - before, time.perf_counter() - started


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check_light(arguments: tuple[str, ...]) -> None:
    """Fails where a command imports torch; what it needs is read before."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        check=True,
        text=True,
    )
    heavy = [
        name
        for line in done.stderr.splitlines()
        if (name := line.rpartition("|")[2].strip())
        in ("torch", "transformers", "numpy", "huggingface_hub")
    ]
    assert not heavy, f"{' '.join(arguments)} imports {heavy}"


def rows() -> list[str]:
    for arguments in COMMANDS.values():
        seconds(arguments)
        check_light(arguments)
    rounds = [
        {name: seconds(arguments) for name, arguments in COMMANDS.items()}
        for _ in range(RUNS)
    ]
    bare = next(iter(COMMANDS))
    lines = []
    for name in COMMANDS:
        cpu, wall = (
            statistics.median(one[name][kind] for one in rounds) for kind in (0, 1)
        )
        ratio = statistics.median(one[name][0] / one[bare][0] for one in rounds)
        lines.append(f"| {name} | {cpu:.3f} | {ratio:.1f} | {wall:.3f} |")
    return lines


def main() -> None:
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = f"""# What a command takes beside a bare interpreter

Whole processes, medians of {RUNS} rounds; ratios are of CPU seconds within a round, so
that load cancels; modules are compiled before, as installing does. `estimate` is
Llama-2-7B under QLoRA; `fits` is the whole catalog in its four ways, and looks for the
longest sequence of what it shows: with `--json`, of all. None of them loads torch,
transformers, numpy or the hub's client.
`python tests/benchmarks/benchmark_estimate.py` writes this file.

{os.cpu_count()} cores, Python {platform.python_version()}, {used}.

| process | CPU seconds | to the first | wall seconds |
|---|--:|--:|--:|
"""
    whole = text + "\n".join(rows()) + "\n"
    REPORT.write_text(whole, encoding="utf-8")
    print(whole)


if __name__ == "__main__":
    main()
