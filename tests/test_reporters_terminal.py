from __future__ import annotations

import pytest

from memplan.reporters import terminal


def test_piped_table_is_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(
        ("name", "bytes", "why"),
        [("weights", "12", "frozen"), ("a.very.long.path", "1,234", "")],
        right=("bytes",),
        title="Two rows",
    )

    shown = capsys.readouterr().out
    assert [line.rstrip() for line in shown.splitlines()] == [
        "Two rows",
        "name              bytes  why",
        "weights              12  frozen",
        "a.very.long.path  1,234",
    ]


def test_cells_are_text_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("name",), [("[bold]q_proj[/bold] :smile:",)])
    terminal.say("[red]note[/red]")

    shown = capsys.readouterr().out
    assert "[bold]q_proj[/bold] :smile:" in shown
    assert "[red]note[/red]" in shown


def test_piped_line_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("name", "more"), [("x" * 150, "y" * 60)])

    assert "x" * 150 + "  " + "y" * 60 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "text"), [([], "0"), ([32], "32"), ([27, 32], "27 + 32")]
)
def test_counts_that_lie_apart_are_a_sum(counts: list[int], text: str) -> None:
    assert terminal.plus(counts) == text


def test_columns_that_may_wrap_keep_within_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PIPED_WIDTH", 40)
    words = "one two three four five six seven eight nine"
    terminal.table(("name", "which is"), [("weights", words)], wraps=("which is",))

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(line[9:].strip() for line in lines[1:]) == words
