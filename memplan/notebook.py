"""Tables for notebooks: HTML that takes its colours from the page around it."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = "background:currentColor;opacity:0.6;height:0.7em;width:{:.1f}em"

BAR_WIDTH_EM = 16.0
"""Of the longest bar."""


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float] = ()
) -> str:
    """A table; `shares` of the largest row's are drawn as bars in a last column."""
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in headers)
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        if shares:
            style = _STYLE.format(BAR_WIDTH_EM * shares[number])
            cells += f"<td><div style='{style}'></div></td>"
        body.append(f"<tr>{cells}</tr>")
    more = "<th aria-hidden='true'></th>" if shares else ""
    return (
        f"<table><thead><tr>{head}{more}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def paragraph(text: str, *, strong: bool = False) -> str:
    """A paragraph of plain text."""
    told = html.escape(text)
    return f"<p><strong>{told}</strong></p>" if strong else f"<p>{told}</p>"
