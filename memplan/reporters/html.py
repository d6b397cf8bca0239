"""A report as one HTML file that needs nothing else: no script, font or picture."""

from __future__ import annotations

import json

from memplan.reporters import palette
from memplan.reporters.document import Document

TEMPLATE = "report.html.j2"


def render(document: Document) -> str:
    """The file's text; light and dark as the reader's system is, light in print."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("memplan.reporters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    # `<` within a script's text could end it.
    numbers = json.dumps(document.numbers, indent=1).replace("<", "\\u003c")
    rendered: str = environment.get_template(TEMPLATE).render(
        document=document,
        light=palette.variables(palette.LIGHT),
        dark=palette.variables(palette.DARK),
        themed=lambda figure: Markup(palette.themed(_apart(figure.svg, figure.name))),
        numbers=Markup(numbers),
    )
    return rendered


def _marked(text: str) -> str:
    """A line of text, what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = [str(escape(part)) for part in text.split("`")]
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return Markup("".join(parts))


def _apart(svg: str, name: str) -> str:
    """The picture, its ids told apart from those of the page's other pictures."""
    svg = svg.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-')
    return svg.replace("url(#", f"url(#{name}-")
