"""The page itself, on Gradio.

Nothing of it comes from another machine: no telemetry, fonts or scripts. It listens on
the loopback address unless it is told otherwise. A Space's `app.py` is
`from memplan.page.app import build, serve; serve(build(), host="0.0.0.0")`.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memplan import exporters
from memplan.catalog import catalog_cards, catalog_models
from memplan.errors import InputError, MissingExtraError
from memplan.page.answer import (
    KEYS,
    Asked,
    answer,
    details,
    export_files,
    first,
    plan,
    report_files,
)
from memplan.recipe import Recipe, recipe_schema, recipe_text
from memplan.reporters import html, palette

if TYPE_CHECKING:
    import gradio

LOOPBACK = "127.0.0.1"
PORT = 7860

NO_CARD = "none"

FIRST_MODEL = "meta-llama/Llama-2-7b-hf"
FIRST_CARD = "GeForce RTX 3060 12GB"
FIRST_KEYS = {"quantization": "nf4-double", "checkpointing": "full"}
"""What the page opens with, which fits."""

_QUIET = {"show_progress": "hidden", "trigger_mode": "always_last", "queue": False}
"""Changes are answered at once, the last of them in any case."""

_LOCK = threading.Lock()
"""Requests come on threads, and a trace changes what the whole process runs."""

_CSS = """\
:root, .gradio-container {{ {light} }}
.dark, .dark .gradio-container {{ {dark} }}
.memplan {{ color: var(--ink); }}
.memplan h2 {{ color: var(--ink); font-size: 1.1rem; margin: 0 0 0.5rem; }}
.memplan section {{ margin-bottom: 1.75rem; }}
.memplan {{ {content} }}
.memplan table, .memplan tr {{ border: 0 !important; }}
.memplan th, .memplan td {{ border-width: 0 0 1px !important; }}
:focus-visible {{ outline: 2px solid var(--link) !important; outline-offset: 2px; }}
.gradio-container:has(#pending .pending) #verdict {{ display: none; }}
footer {{ display: none !important; }}
"""


def serve(
    blocks: gradio.Blocks,
    host: str = LOOPBACK,
    port: int | None = PORT,
    *,
    opens: bool = False,
) -> None:
    """Serves the page until it is interrupted.

    Raises InputError for a port that is taken.
    """
    # What is loaded stays, so that the collector need not walk it with each answer.
    gc.freeze()
    try:
        blocks.launch(**launch_options(host, port), inbrowser=opens)
    except OSError as error:
        remedy = "give another with --port"
        raise InputError("--port", port, f"cannot be used ({error})", remedy) from error


def launch_options(host: str, port: int | None) -> dict[str, Any]:
    """What Gradio is told: no telemetry, sharing, history, or links to elsewhere."""
    import gradio

    css = _CSS.format(
        light=palette.variables(palette.LIGHT),
        dark=palette.variables(palette.DARK),
        content=html.content_css(),
    )
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "quiet": True,
        "theme": _theme(gradio),
        "css": css,
    }


def _theme(gradio: Any) -> Any:
    """Gradio's plainest, in the palette's colours and the system's fonts."""
    base = gradio.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    colours = {
        f"{key}{suffix}": theme[role]
        for suffix, theme in (("", palette.LIGHT), ("_dark", palette.DARK))
        for key, role in _ROLES.items()
    }
    # White on the light theme's blue in both.
    button = {
        "button_primary_background_fill": palette.LIGHT["link"],
        "button_primary_background_fill_dark": palette.LIGHT["link"],
        "button_primary_text_color": palette.LIGHT["paper"],
        "button_primary_text_color_dark": palette.LIGHT["paper"],
    }
    return base.set(**colours, **button)


_ROLES = {
    "body_background_fill": "paper",
    "body_text_color": "ink",
    "body_text_color_subdued": "quiet",
    "block_background_fill": "paper",
    "block_info_text_color": "quiet",
    "block_label_text_color": "ink",
    "block_title_text_color": "ink",
    "button_secondary_background_fill": "panel",
    "button_secondary_text_color": "ink",
    "input_background_fill": "panel",
    "input_placeholder_color": "quiet",
}
"""Variables of Gradio's themes, and the roles of their colours."""


def build() -> gradio.Blocks:
    """The page; raises MissingExtraError without Gradio."""
    # Both are read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise MissingExtraError("ui", error.name or "gradio", "ui") from error
    with gradio.Blocks(
        title="memplan", analytics_enabled=False, fill_width=True
    ) as blocks:
        gradio.Markdown("# memplan\nHow much GPU memory a fine-tune takes.")
        pending, verdict = _html(gradio, "pending"), _html(gradio, "verdict")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                controls = _controls(gradio)
                _actions(gradio, controls)
            with gradio.Column(scale=3, min_width=320):
                breakdown = _html(gradio, "breakdown")
                memory = _html(gradio, "memory")
            with gradio.Column(scale=3, min_width=320):
                changes = _html(gradio, "changes")
        triggers = [blocks.load, *(one.change for one in controls)]
        # Side by side: what is known at once is shown until the verdict is there, and
        # goes with it, or with the details if it should come late.
        gradio.on(triggers, _first, controls, pending, **_QUIET)
        answered = [pending, verdict, breakdown]
        said = gradio.on(triggers, _answered, controls, answered, **_QUIET)
        said.then(_detailed, controls, [pending, memory, changes], **_QUIET)
    built: gradio.Blocks = blocks
    return built


def _html(gradio: Any, name: str) -> Any:
    """A place that is filled with HTML."""
    return gradio.HTML(elem_id=name, elem_classes="memplan", padding=False)


def _controls(gradio: Any) -> list[Any]:
    """One for each part of what is asked, in the order that `_asked` takes them."""
    models = [one.architecture for one in catalog_models()]
    names = [one.name for one in models if one.generative]
    cards = [one.card["name"] for one in catalog_cards() if one.gpu is not None]
    first = Recipe.from_mapping(FIRST_KEYS)
    found = [
        gradio.Dropdown(names, value=FIRST_MODEL, label="Model"),
        gradio.Dropdown([(NO_CARD, ""), *cards], value=FIRST_CARD, label="Card"),
        gradio.Textbox(label="Or its size, such as 12GB"),
        *(_control(gradio, key, getattr(first, key)) for key in KEYS),
    ]
    with gradio.Accordion("More", open=False):
        found += [
            gradio.Textbox(
                label="Further keys of the recipe",
                info="As in a recipe file, a line each: `targets: attention`.",
                lines=4,
            ),
            gradio.Textbox(
                label="config.json",
                info="Pasted here it takes the model's place; torch has to be "
                "installed to build it.",
                lines=4,
            ),
        ]
    return found


def _control(gradio: Any, key: str, value: Any) -> Any:
    """The control of a key, by what the recipe's schema says that it may hold."""
    schema = recipe_schema()["properties"][key]
    label = key.replace("_", " ").capitalize()
    options = {"label": label, "info": schema["description"], "value": value}
    if schema.get("type") == "integer":
        return gradio.Number(**options, precision=0, minimum=1)
    return gradio.Dropdown(schema["enum"], **options)


def _actions(gradio: Any, controls: list[Any]) -> None:
    """Buttons: plan, write a report, export."""
    told = _html(gradio, "told")
    button = gradio.Button("Plan for this card", variant="primary")
    button.click(_planned, controls, [*controls, told])
    written = gradio.File(label="Report", visible=False, file_count="multiple")
    button = gradio.Button("Write a report")
    button.click(_written(gradio, report_files), controls, [written, told])
    trainer = gradio.Dropdown(
        list(exporters.names()), value="trl", label="Trainer to export for"
    )
    exported = gradio.File(label="Export", visible=False, file_count="multiple")
    button = gradio.Button("Export")
    button.click(_written(gradio, export_files), [*controls, trainer], [exported, told])


def _asked(*values: Any) -> Asked:
    model, card, size, *rest = values
    keys, (more, config) = rest[: len(KEYS)], rest[len(KEYS) :]
    return Asked(
        model=model or "",
        config=config or "",
        card=size or card or "",
        keys=tuple(
            (key, value)
            for key, value in zip(KEYS, keys, strict=True)
            if value is not None
        ),
        more=more or "",
    )


def _first(*values: Any) -> str:
    """At once: it traces nothing, so that it waits for nobody."""
    return first(_asked(*values))


def _answered(*values: Any) -> tuple[str, str, str]:
    with _LOCK:
        found = answer(_asked(*values))
    return "", found.verdict, found.breakdown


def _detailed(*values: Any) -> tuple[str, str, str]:
    with _LOCK:
        found = details(_asked(*values))
    return "", found.memory, found.changes


_PLANNED_BY = (
    "This page plans by the estimate, the replay of its allocations included; "
    "`memplan plan` simulates what it chooses."
)


def _planned(*values: Any) -> tuple[Any, ...]:
    """The controls as the plan has them, and why."""
    try:
        with _LOCK:
            found = plan(_asked(*values))
    except InputError as error:
        return (*values, html.alert(str(error)))
    keys = found.recipe.to_json()
    shown = Recipe(**{key: keys[key] for key in KEYS}).to_json()
    more = {key: value for key, value in keys.items() if value != shown[key]}
    told = html.paragraphs((*found.reasons, _PLANNED_BY))
    model, card, size, *rest = values
    settled = (keys[key] for key in KEYS)
    return (model, card, size, *settled, recipe_text(more), rest[-1], told)


def _written(gradio: Any, write: Callable[..., list[str]]) -> Callable[..., Any]:
    """What a button does that writes files: shows them, or says what is wrong."""

    def click(*values: Any) -> tuple[Any, str]:
        count = len(KEYS) + 5
        try:
            with _LOCK:
                files = write(_asked(*values[:count]), *values[count:])
        except InputError as error:
            return gradio.update(visible=False), html.alert(str(error))
        return gradio.update(value=files, visible=True), ""

    return click
