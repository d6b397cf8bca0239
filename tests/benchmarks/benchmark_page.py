"""How soon the page answers a change: its functions, and in headless Chromium.

`python tests/benchmarks/benchmark_page.py` writes reports/benchmark_page.md. The rank
is changed; what is timed is when the closed form's line, the verdict, and the pictures
and levers are there. Medians of ROUNDS. It needs `memplan[ui]` and Debian's chromium.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import choose, chromium, opened

from memplan.catalog import inspect
from memplan.page import app
from memplan.page.answer import Asked, answer, details, estimated, first
from memplan.reporters.json import versions

MODELS = (
    "openai-community/gpt2",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Llama-3.1-405B",
)
KEYS = (("quantization", "nf4-double"), ("checkpointing", "full"))
CARD = "A100-SXM4-80GB"
RANKS = (4, 64, 8, 32, 16, 128, 24)
PORT = 7899
SETTLED_MS = 4000
"""After which nothing of an earlier change is still being computed."""

REPORT = Path(__file__).parents[2] / "reports" / "benchmark_page.md"

STAGES = {"closed form": first, "verdict": answer, "pictures and levers": details}

WATCH = """() => {
  const times = window.times = {};
  const now = performance.now.bind(performance);
  const watch = (id, note) => new MutationObserver(note).observe(
    document.getElementById(id),
    {subtree: true, childList: true, characterData: true});
  const pending = () => document.querySelector("#pending .pending");
  const verdict = () => document.querySelector("#verdict .verdict")?.textContent;
  const before = verdict();
  watch("pending", () => { if (pending()) times["closed form"] ??= now(); });
  watch("verdict", () => {
    if (verdict() && verdict() !== before) times["verdict"] ??= now();
  });
  for (const id of ["memory", "changes"])
    watch(id, () => { times["pictures and levers"] = now(); });
}"""
"""Notes when the first two are first seen, and when the last was last changed."""


def computed(model: str) -> dict[str, float]:
    """Milliseconds of a process's own until each stage is computed, by stage."""

    def asked(rank: int) -> Asked:
        keys = (*KEYS, ("rank", rank))
        return Asked(model=model, config="", card=CARD, keys=keys, more="")

    for stage in STAGES.values():
        stage(asked(12))
    spent: dict[str, list[float]] = {name: [] for name in STAGES}
    for rank in RANKS:
        started = time.process_time()
        for name, stage in STAGES.items():
            stage(asked(rank))
            spent[name].append(1000 * (time.process_time() - started))
    estimated.cache_clear()
    return {name: statistics.median(times) for name, times in spent.items()}


def seen(page: Any) -> dict[str, float]:
    """Milliseconds from a change until each stage is on the page, by stage."""
    rank = page.get_by_label("Rank", exact=True).first
    spent: dict[str, list[float]] = {name: [] for name in STAGES}
    for value in RANKS:
        page.evaluate(WATCH)
        started = page.evaluate("performance.now()")
        rank.fill(str(value))
        page.wait_for_timeout(SETTLED_MS)
        for name, moment in page.evaluate("window.times").items():
            spent[name].append(moment - started)
    return {name: statistics.median(times) for name, times in spent.items()}


@contextmanager
def served() -> Iterator[str]:
    """The address of the page, which the command serves in a process of its own."""
    url = f"http://{app.LOOPBACK}:{PORT}"
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", "ui", "--port", str(PORT)]
    )
    try:
        while not _answers(url):
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except OSError:
        return False


def rows() -> Iterator[str]:
    with served() as url, chromium() as browser:
        page = opened(browser, url, width=1280, scheme="light").page
        page.wait_for_selector("#changes section")
        choose(page, "Card", CARD)
        for model in MODELS:
            choose(page, "Model", model)
            page.wait_for_timeout(SETTLED_MS)
            yield row(model, computed(model), seen(page))


def row(model: str, own: dict[str, float], there: dict[str, float]) -> str:
    cells = [model, str(inspect(model).num_layers)]
    cells += [f"{side[name]:.0f}" for side in (own, there) for name in STAGES]
    return f"| {' | '.join(cells)} |"


def main(write: Callable[[str], object] = REPORT.write_text) -> None:
    told = "\n".join(rows())
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    libraries = ", ".join(f"{name} {one}" for name, one in versions().items())
    write(TEXT.format(rows=told, machine=machine, libraries=libraries))


TEXT = """\
# How soon the page answers a change

A change of the rank, under QLoRA with checkpointing; medians of 7, in milliseconds from
the change. `first` is the closed form's line, of what is allocated; the verdict and the
breakdown, which are the command's, wait for the replay of every layer's allocations;
pictures and levers follow. Computed: processor time of the functions alone. Seen: in
headless Chromium on the machine that serves the page, with whatever else it runs.
`python tests/benchmarks/benchmark_page.py` writes this file.

{machine}, {libraries}.

| model | layers | computed: first | verdict | all | seen: first | verdict | all |
|---|--:|--:|--:|--:|--:|--:|--:|
{rows}

An answer within 300 ms is held by a test of the closed form for the largest model, and
of the verdict for one of 32 layers; for models of many more layers the verdict itself
takes longer, which is why the closed form is shown first.
"""


if __name__ == "__main__":
    main()
