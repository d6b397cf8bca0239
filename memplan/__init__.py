"""memplan: how much GPU memory a fine-tune takes, and what to run so that it fits.

The nouns are `Architecture`, `Recipe`, `Gpu`, `Footprint`, `Profile` and `Plan`;
`inspect` reads a model into an `Architecture`, `find_gpu` a card's name into a `Gpu`,
`estimate` and `simulate` turn the three into a `Footprint`, `measure` runs them into a
`Profile`, and `solve` chooses a `Plan`. Importing it loads none of them.

>>> import memplan
>>> model = memplan.inspect("meta-llama/Llama-2-7b-hf")
>>> card = memplan.find_gpu("RTX 3060")
>>> recipe = memplan.Recipe(quantization="nf4-double", batch_size=1)
>>> memplan.estimate(model, recipe, card).fits
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.architecture import Architecture
    from memplan.catalog import inspect
    from memplan.errors import InputError, MemplanError
    from memplan.estimator import estimate
    from memplan.footprint import Footprint, Moment
    from memplan.gpu import Gpu, find_gpu
    from memplan.inference import Inference
    from memplan.plan import Plan
    from memplan.planner.solve import solve
    from memplan.profile import Profile
    from memplan.profiler import measure
    from memplan.recipe import Recipe
    from memplan.simulator import simulate

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Footprint",
    "Gpu",
    "Inference",
    "InputError",
    "MemplanError",
    "Moment",
    "Plan",
    "Profile",
    "Recipe",
    "estimate",
    "find_gpu",
    "inspect",
    "measure",
    "simulate",
    "solve",
]

_MODULES = {
    "Architecture": "architecture",
    "Footprint": "footprint",
    "Gpu": "gpu",
    "Inference": "inference",
    "InputError": "errors",
    "MemplanError": "errors",
    "Moment": "footprint",
    "Plan": "plan",
    "Profile": "profile",
    "Recipe": "recipe",
    "estimate": "estimator",
    "find_gpu": "gpu",
    "inspect": "catalog",
    "measure": "profiler",
    "simulate": "simulator",
    "solve": "planner.solve",
}


def __getattr__(name: str) -> Any:
    """Loads a noun or verb when it is first used, so that importing costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    return getattr(importlib.import_module(f"memplan.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
