"""A report as one HTML file that needs nothing else: no script, font or picture."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memplan.reporters import palette
from memplan.reporters.document import Document, Section
from memplan.reporters.figures import Figure

if TYPE_CHECKING:
    from jinja2 import Environment


def render(document: Document) -> str:
    """The file's text; light and dark as the reader's system is, light in print."""
    from markupsafe import Markup

    # `<` within a script's text could end it.
    text = json.dumps(document.numbers, separators=(",", ":"))
    numbers = text.replace("<", "\\u003c")
    return _rendered(
        "report.html.j2",
        document=document,
        light=palette.variables(palette.LIGHT),
        dark=palette.variables(palette.DARK),
        numbers=Markup(numbers),
    )


def fragment(sections: Sequence[Section]) -> str:
    """Sections for a page that has the palette's variables and `content_css`."""
    return _rendered("fragment.html.j2", sections=sections)


def verdict(sentence: str, fits: bool | None) -> str:
    """The verdict alone, for such a page."""
    return _rendered("verdict.html.j2", sentence=sentence, fits=fits)


def pending(sentence: str) -> str:
    """What is known before the verdict."""
    return _rendered("pending.html.j2", sentence=sentence)


def alert(sentence: str) -> str:
    """What is wrong, which screen readers say at once."""
    return _rendered("alert.html.j2", sentence=sentence)


def paragraphs(lines: Sequence[str]) -> str:
    """Lines of text, a paragraph each."""
    return _rendered("paragraphs.html.j2", lines=lines)


def content_css() -> str:
    """The style of what a report shows, without that of the page around it."""
    return _rendered("content.css.j2")


def _rendered(template: str, **values: Any) -> str:
    found: str = _environment().get_template(template).render(**values)
    return found


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("memplan.reporters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    environment.filters["themed"] = _themed
    return environment


def _marked(text: str) -> str:
    """A line of text, what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = [str(escape(part)) for part in text.split("`")]
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return Markup("".join(parts))


def _themed(figure: Figure) -> str:
    """The picture in the page's colours, its ids told apart from other pictures'."""
    from markupsafe import Markup

    name, svg = figure.name, palette.themed(figure.svg)
    svg = svg.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-')
    return Markup(svg.replace("url(#", f"url(#{name}-"))
