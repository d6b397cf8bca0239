"""A report as Markdown, its figures as SVG files in a folder beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.reporters.document import Code, Document, Section, Table

PROLOG = '<?xml version="1.0" encoding="utf-8"?>\n'


def render(document: Document) -> str:
    """The file's text; pictures are looked for in the folder of the report's name."""
    lines = [f"# {document.title}", "", f"**{document.verdict}**", ""]
    for line in document.lead:
        lines += [line, ""]
    for section in document.sections:
        lines += _section(section, document.name)
    return "\n".join(lines).rstrip() + "\n"


def pictures(document: Document) -> dict[str, str]:
    """The figures' files, by name, within the folder."""
    return {f"{one.name}.svg": PROLOG + one.svg for one in document.figures}


def table(shown: Table) -> list[str]:
    """A table's lines; a bar within a cell is escaped."""
    rules = ["--:" if name in shown.right else "---" for name in shown.columns]
    return [_line(shown.columns), _line(rules), *map(_line, shown.rows)]


def _section(section: Section, name: str) -> Iterator[str]:
    yield from (f"## {section.title}", "")
    for line in section.words:
        yield from (line, "")
    if section.figure is not None:
        yield from (
            f"![{section.figure.words}]({name}/{section.figure.name}.svg)",
            "",
        )
    if section.table is not None:
        yield from (*table(section.table), "")
    for code in section.code:
        yield from _code(code)


def _code(code: Code) -> Iterator[str]:
    """A text to copy, fenced by more backticks than it holds."""
    fence = "````" if "```" in code.text else "```"
    yield from (f"{code.name}:", "", fence, code.text.rstrip("\n"), fence, "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
