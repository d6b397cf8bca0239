"""What WCAG 2.2 asks of contrast, in both themes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from memplan.footprint import CATEGORIES
from memplan.reporters.palette import DARK, LIGHT, contrast, themed

TEXT, DRAWN = 4.5, 3.0
"""Success criteria 1.4.3 and 1.4.11."""

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def test_contrast_is_wcags() -> None:
    """Its own example: black on white is 21; #777777 on white is just below 4.5."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@THEMES
@pytest.mark.parametrize("role", ["ink", "quiet", "link", "line", "good", "bad"])
@pytest.mark.parametrize("ground", ["paper", "panel"])
def test_text_can_be_read(theme: Mapping[str, str], role: str, ground: str) -> None:
    assert contrast(theme[role], theme[ground]) >= TEXT


@THEMES
@pytest.mark.parametrize("category", CATEGORIES)
def test_categories_can_be_seen(theme: Mapping[str, str], category: str) -> None:
    assert contrast(theme[category], theme["paper"]) >= DRAWN


@THEMES
def test_neighbours_differ_in_lightness(theme: Mapping[str, str]) -> None:
    """So that who sees no colour tells them apart."""
    for one, other in pairwise(CATEGORIES):
        assert contrast(theme[one], theme[other]) >= 1.5, (one, other)


def test_every_colour_has_one_role() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert LIGHT.keys() == DARK.keys()
    assert themed(f"fill: {LIGHT['quantization_state']}") == (
        "fill: var(--quantization-state)"
    )
