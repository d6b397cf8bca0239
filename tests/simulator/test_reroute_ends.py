"""What stands in while a step is simulated is gone afterwards."""

from __future__ import annotations

import subprocess
import sys

SIMULATES_FIRST = """
from memplan.catalog import inspect
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator import simulate

recipe = Recipe(loss="chunked", sequence_length=64)
simulate(inspect("openai-community/gpt2"), recipe, find_gpu("T4"))

from trl.trainer import utils
print(utils._use_triton.__module__)
"""


def test_trl_is_as_it_was_where_a_simulation_imports_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SIMULATES_FIRST],
        capture_output=True,
        text=True,
        check=True,
    )

    assert ran.stdout.split()[-1].startswith("trl.")
