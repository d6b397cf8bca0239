"""What a run depends on besides its recipe: versions, card, driver, settings."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from typing import Any

import torch

from memplan import __version__
from memplan.errors import InputError
from memplan.gpu import nvml_session

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch reads the allocator's settings; the first wins."""


def environment(device: str) -> dict[str, str]:
    """Versions and settings, as text."""
    found = {"memplan": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["platform"] = platform.platform()
    if device == "cpu":
        return found | {"threads": str(torch.get_num_threads())}
    settings = [os.environ[key] for key in ALLOCATOR_SETTINGS if os.environ.get(key)]
    found["allocator"] = settings[0] if settings else ""
    found["cuda"] = str(torch.version.cuda)
    with contextlib.suppress(InputError), nvml_session() as nvml:
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
    return found


def card() -> dict[str, Any]:
    """The card as torch sees it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capacity_bytes": properties.total_memory,
        "compute_capability": [properties.major, properties.minor],
        "native_bf16": properties.major >= 8,
    }
