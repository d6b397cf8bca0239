"""Opens pages in headless Chromium, which tests are skipped without.

Chromium is Debian's (`apt-get install chromium`); Playwright drives it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = os.environ.get("MEMPLAN_CHROMIUM") or shutil.which("chromium")

ON_THIS_MACHINE = ("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1")

WIDTHS = {"desktop": 1280, "phone": 390}


@dataclass(slots=True)
class Watched:
    """A page, and what it said and asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    """Errors and warnings on its console, and exceptions."""
    leaving: list[str] = field(default_factory=list)
    """Addresses of other machines that it asked for."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def opened(browser: Any, url: str, *, width: int, scheme: str) -> Watched:
    """A page at an address, at a width, in a colour scheme."""
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    watched = Watched(page)
    page.on("console", lambda told: _note(watched, told))
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("request", lambda asked: _note_request(watched, asked.url))
    page.goto(url)
    return watched


FAINT = """() => {
  const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const [r, g, b, a = 1] = parts(getComputedStyle(element).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const ratio = (one, other) => {
    const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height || !element.checkVisibility()) continue;
    if (element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element);
    const inked = element instanceof SVGElement ? style.fill : style.color;
    const [r, g, b, a = 1] = parts(inked);
    const contrast = ratio([r, g, b], ground(element));
    if (a < 0.99 || contrast < 4.5) found.push(`${text.slice(0, 40)}: ${inked}`);
  }
  for (const input of document.querySelectorAll("input, textarea")) {
    if (!input.checkVisibility()) continue;
    const ink = parts(getComputedStyle(input).color);
    if (ratio(ink, ground(input)) < 4.5) found.push(`value of ${input.ariaLabel}`);
  }
  return found;
}"""
"""Text whose contrast with what lies behind it is below 4.5 (WCAG 2.2, 1.4.3)."""


def choose(page: Any, label: str, text: str) -> None:
    """Sets a control by the keyboard, as one does who uses no mouse.

    Each key waits for what the one before it has changed.
    """
    control = page.get_by_label(label, exact=True).first
    is_list = control.get_attribute("role") == "combobox"
    control.focus()
    if is_list:
        _becomes(page, control, "control.ariaExpanded === 'true'")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.press("Delete")
    _becomes(page, control, "control.value === ''")
    page.keyboard.type(text)
    _becomes(page, control, "control.value === text", text)
    if is_list:
        page.locator("ul li.active", has_text=text).wait_for()
    page.keyboard.press("Enter")
    if is_list:
        _becomes(page, control, "control.ariaExpanded === 'false'")
    else:
        page.keyboard.press("Tab")
    _becomes(page, control, "control.value === text", text)


def _becomes(page: Any, control: Any, condition: str, text: str = "") -> None:
    """Waits until a condition in JavaScript holds of the control."""
    page.wait_for_function(
        f"([control, text]) => {condition}", arg=[control.element_handle(), text]
    )


def _note(watched: Watched, told: Any) -> None:
    if told.type in ("error", "warning"):
        watched.errors.append(told.text)


def _note_request(watched: Watched, url: str) -> None:
    if not url.startswith(ON_THIS_MACHINE):
        watched.leaving.append(url)
