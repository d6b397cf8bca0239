"""The colours of every figure and page, in a light and a dark theme.

Neighbours in a stack differ in lightness, so that they are told apart by people who see
colours otherwise, and in print. A test holds what WCAG 2.2 asks of contrast: 4.5 for
text, 3 for what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f4f5f7",
    "ink": "#1b1f24",
    "quiet": "#59626d",
    "grid": "#d9dde2",
    "line": "#a1122b",
    "link": "#0b57a4",
    "good": "#17663a",
    "bad": "#a3161d",
    "weights": "#332288",
    "quantization_state": "#7d86d4",
    "adapters": "#0b5d3c",
    "gradients": "#2d9d79",
    "optimizer": "#6b1d50",
    "activations": "#cf5f2e",
    "logits": "#6e3700",
    "kv_cache": "#2f6f95",
    "workspace": "#9a8a1e",
    "cache": "#5c6571",
    "context": "#8b95a1",
    "paged": "#166a85",
}
"""By role: page and text, then memory's categories."""

DARK: Mapping[str, str] = {
    "paper": "#14171b",
    "panel": "#1e2329",
    "ink": "#eceff2",
    "quiet": "#a9b3be",
    "grid": "#39414a",
    "line": "#ff8c98",
    "link": "#8ec5ff",
    "good": "#7bdca1",
    "bad": "#ff9a9a",
    "weights": "#8f85ea",
    "quantization_state": "#c9cfff",
    "adapters": "#38a876",
    "gradients": "#a4f0ce",
    "optimizer": "#c9669d",
    "activations": "#ffb48b",
    "logits": "#b8803e",
    "kv_cache": "#3f6f9f",
    "workspace": "#e9da89",
    "cache": "#87929e",
    "context": "#cbd3db",
    "paged": "#5cb4d1",
}

SERIES = ("weights", "activations", "adapters", "optimizer", "workspace", "paged")
"""The colours of what is no category, in their order."""


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, from 1 to 21."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`, from 0 to 1."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    ]
    return sum(
        share * value
        for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def variables(theme: Mapping[str, str]) -> str:
    """A theme as CSS variables, a declaration each."""
    return " ".join(f"--{_css(name)}: {colour};" for name, colour in theme.items())


def themed(svg: str) -> str:
    """A picture drawn in LIGHT, its colours as CSS variables of the page's theme."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{_css(name)})")
    return svg


def _css(name: str) -> str:
    return name.replace("_", "-")
