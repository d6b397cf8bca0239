"""The page in a browser: its controls, its words; nothing leaves the machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import FAINT, WIDTHS, Watched, choose, chromium, opened
from command_line import run

from memplan.errors import InputError
from memplan.page import app

LLAMA = ("meta-llama/Llama-2-7b-hf", "--gpu", "GeForce RTX 3060 12GB")
OPENS_WITH = {"--quantization": "nf4-double", "--checkpointing": "full"}

SIZE = "Or its size, such as 12GB"
VERDICT = "#verdict .verdict"


START_SECONDS = 120


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The page of a `memplan ui` of its own, as what it still computes goes with it."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind((app.LOOPBACK, 0))
        port = free.getsockname()[1]
    served = [sys.executable, "-m", "memplan", "ui", "--port", str(port)]
    with subprocess.Popen(served, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until_open(port, process)
            yield f"http://{app.LOOPBACK}:{port}/"
        finally:
            process.terminate()


def wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "memplan ui ended"
        with contextlib.suppress(OSError):
            socket.create_connection((app.LOOPBACK, port), timeout=1).close()
            return
        time.sleep(0.1)
    raise AssertionError("memplan ui does not answer")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def watched(browser: Any, url: str) -> Iterator[Watched]:
    found = ready(browser, url, width=1280, scheme="light")
    yield found
    found.page.close()


def ready(browser: Any, url: str, *, width: int, scheme: str) -> Watched:
    found = opened(browser, url, width=width, scheme=scheme)
    found.page.wait_for_selector(VERDICT)
    found.page.wait_for_selector("#changes section")
    return found


def said(**changed: str) -> str:
    """What the command says of what the page opens with, with changes."""
    named = {f"--{key.replace('_', '-')}": value for key, value in changed.items()}
    options = [part for pair in (OPENS_WITH | named).items() for part in pair]
    return f"{run('estimate', *LLAMA, *options).out.splitlines()[1]}."


def shows(page: Any, text: str) -> None:
    page.wait_for_function(
        "([where, text]) => document.querySelector(where)?.innerText.trim() === text",
        arg=[VERDICT, text],
        timeout=40_000,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_page_opens_with_the_command_s_verdict(
    browser: Any, url: str, width: int, scheme: str
) -> None:
    found = ready(browser, url, width=width, scheme=scheme)
    page = found.page

    assert (found.errors, found.leaving) == ([], [])
    assert page.locator(VERDICT).inner_text() == said()
    assert page.locator("#memory svg").bounding_box()["height"] > 100
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_text("More", exact=True).click()
    page.get_by_label("config.json").wait_for()
    assert page.evaluate(FAINT) == []
    page.close()


@pytest.mark.parametrize(
    ("label", "key", "value"),
    [
        ("Rank", "rank", "64"),
        ("Batch size", "batch_size", "4"),
        ("Sequence length", "sequence_length", "1024"),
        ("Method", "method", "dora"),
        ("Quantization", "quantization", "none"),
        ("Checkpointing", "checkpointing", "none"),
        ("Optimizer", "optimizer", "paged-adamw-8bit"),
        ("Trainer", "trainer", "trl"),
    ],
)
def test_a_control_changes_the_verdict_by_keyboard(
    watched: Watched, label: str, key: str, value: str
) -> None:
    choose(watched.page, label, value)

    shows(watched.page, said(**{key: value}))
    assert (watched.errors, watched.leaving) == ([], [])


def test_what_cannot_be_read_would_be_found(watched: Watched) -> None:
    watched.page.add_style_tag(content=".verdict { color: #8b95a1 !important; }")

    (found,) = watched.page.evaluate(FAINT)
    assert found.startswith(said()[:20])


def test_a_size_is_taken_for_a_card(watched: Watched) -> None:
    choose(watched.page, SIZE, "4GB")

    verdict = watched.page.locator(
        f"{VERDICT}.fits-not", has_text="Does not fit on 4GB"
    )
    verdict.wait_for()


def test_another_model_is_chosen(watched: Watched) -> None:
    choose(watched.page, "Model", "distilbert/distilgpt2")

    watched.page.wait_for_function(
        "text => document.querySelector('#verdict').innerText !== text", arg=said()
    )
    assert "Fits on" in watched.page.locator(VERDICT).inner_text()


def test_what_is_wrong_is_said_in_words(watched: Watched) -> None:
    choose(watched.page, SIZE, "twelve")

    alert = watched.page.wait_for_selector("#verdict [role=alert]")
    assert "twelve" in alert.inner_text()
    choose(watched.page, SIZE, "")
    shows(watched.page, said())
    assert watched.leaving == []


def test_a_plan_sets_the_controls(watched: Watched) -> None:
    page = watched.page
    page.get_by_role("button", name="Plan for this card").click()

    page.wait_for_selector("#told p", timeout=60_000)
    assert "leads" in page.locator("#told").inner_text()
    page.wait_for_function(
        "where => document.querySelector(where)?.innerText.startsWith('Fits on')",
        arg=VERDICT,
        timeout=40_000,
    )
    assert watched.errors == []


def test_a_report_and_an_export_can_be_downloaded(watched: Watched) -> None:
    page = watched.page
    for button, name in (("Write a report", ".html"), ("Export", "trl.zip")):
        page.get_by_role("button", name=button, exact=True).click()
        link = page.locator(f"a[download$='{name}']").first
        link.wait_for(timeout=60_000)
        with page.expect_download() as download:
            link.click()
        assert download.value.path().stat().st_size > 500
    assert watched.leaving == []


def test_a_port_that_is_taken_is_said(url: str) -> None:
    port = int(url.rstrip("/").rpartition(":")[2])

    with pytest.raises(InputError, match="--port"):
        app.serve(app.build(), port=port)
