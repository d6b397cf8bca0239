"""Makes the sample reports again: reports/samples, by the commands that it holds.

`python reports/make_samples.py` makes all but the plan itself and the validation, which
take long: `--all` makes those too. Names given besides are the samples to be made.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = Path("reports") / "samples"
PLAN = FOLDER / "plan.json"

GLM = FOLDER / "chatglm2-6b"
METHODS = ("full", "lora", "qlora", "adaq-lora")
"""Recipe files in that folder, with the optimizer, clipping and precision of
ADAQ-LoRA's paper."""

SAMPLES: dict[str, tuple[str, ...]] = {
    "fits-12gb": ("--fits", "--gpu", "12GB"),
    "llama-2-7b-qlora": (
        *("meta-llama/Llama-2-7b-hf", "--gpu", "12GB"),
        *("--quantization", "nf4", "--rank", "16"),
    ),
    "chatglm2-6b-four-methods": (
        *("THUDM/chatglm2-6b", "--gpu", "24GB"),
        *(part for name in METHODS for part in ("--recipe", str(GLM / f"{name}.yaml"))),
    ),
    "plan": (str(PLAN), "--no-simulate"),
}
"""Arguments of `memplan report`, by the name of the sample."""

VALIDATION = {"validation": ("--validate",)}

PLANNED = ("meta-llama/Llama-2-7b-hf", "--gpu", "12GB", "--alternatives", "8")


def main(arguments: Sequence[str]) -> None:
    """Makes the samples that are named, or all."""
    names = [name for name in arguments if name != "--all"]
    wanted = SAMPLES
    if "--all" in arguments:
        PLAN.write_text(memplan("plan", *PLANNED, "--json"))
        wanted = SAMPLES | VALIDATION
    for name, asked in wanted.items():
        if not names or name in names:
            make(name, asked, FOLDER)


def make(name: str, asked: Sequence[str], out: Path) -> None:
    """Writes a sample into a folder."""
    memplan("report", *asked, "--out", str(out), "--name", name)


def memplan(*arguments: str) -> str:
    """What a command prints, in a process that keeps nothing and knows nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        capture_output=True,
        check=False,
        cwd=REPOSITORY,
        env=os.environ | {"MEMPLAN_CACHE": "off"},
        text=True,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"memplan {' '.join(arguments)}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
