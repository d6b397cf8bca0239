"""What stands in while something is traced is gone afterwards."""

from __future__ import annotations

import subprocess
import sys

TRACES_FIRST = """
from memplan.simulator.taping import trace_layer
from memplan.tape import LayerRegime

trace_layer(
    LayerRegime(
        method="dora",
        quantization="nf4",
        dtype="bfloat16",
        input_dtype="float32",
        autocast="none",
        compute_dtype="bfloat16",
        adapter_dtype="float32",
        input_casts=True,
        dropout=False,
        bias=False,
        by_trl=True,
    )
)

from trl.trainer import utils
print(utils._use_triton.__module__)
"""


def test_trl_is_as_it_was_where_a_trace_imports_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TRACES_FIRST],
        capture_output=True,
        text=True,
        check=True,
    )

    assert ran.stdout.split()[-1].startswith("trl.")
