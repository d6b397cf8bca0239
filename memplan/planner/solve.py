"""`solve`: the recipe to run within a card, as a verb of Python."""

from __future__ import annotations

from collections.abc import Collection

from memplan.architecture import Architecture
from memplan.gpu import Gpu
from memplan.plan import Plan
from memplan.planner.choices import MARGIN_SHARE, Estimate, Floors
from memplan.planner.decide import Asked, plan
from memplan.planner.means import less_margin, means_on
from memplan.planner.ranks import DEFAULT_PRIOR
from memplan.recipe import Recipe


def solve(  # noqa: PLR0913 - each is a part of what is asked
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    *,
    settled: Collection[str] = (),
    prefer: str = "speed",
    verify: bool = True,
) -> Plan:
    """The recipe to run within a card's memory, with a rank for every module.

    `recipe` gives the sequence length that is asked for at least, and the values of the
    keys that `settled` names; all others are chosen, for `speed` or `quality` first.
    Two per cent of the budget stay free. With `verify` the simulation has the last
    word, which needs torch; else the estimate has. Raises InputError where nothing
    fits, MissingExtraError where a part is not installed.

    >>> import memplan
    >>> model = memplan.inspect("Qwen/Qwen2.5-0.5B")
    >>> asked = memplan.Recipe(sequence_length=1024)
    >>> made = memplan.solve(model, asked, memplan.find_gpu("8GB"), verify=False)
    >>> made.footprint.fits, made.recipe.sequence_length >= 1024
    (True, True)
    """
    margin_bytes = int(MARGIN_SHARE * gpu.budget_bytes)
    asked = Asked(
        base=recipe,
        given=frozenset(settled),
        floors=Floors(
            sequence_length=recipe.sequence_length, margin_bytes=margin_bytes
        ),
        prefer=prefer,
        granularity="by-type",
        prior=DEFAULT_PRIOR,
    )

    verified = _simulation(architecture, gpu, margin_bytes) if verify else None
    means = means_on(architecture, gpu, margin_bytes, verified)
    return plan(architecture, gpu, asked, means)


def _simulation(architecture: Architecture, gpu: Gpu, margin_bytes: int) -> Estimate:
    """The simulated footprint within the budget less the margin."""
    from memplan.simulator import simulate

    return less_margin(
        gpu, margin_bytes, lambda tried, card: simulate(architecture, tried, card)
    )
