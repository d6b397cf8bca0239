"""The command line: a click group that loads a command's module when it is called.

Exit codes: 0 computed, or it fits; 1 it does not fit; 2 bad input; 3 internal error;
130 for Ctrl-C. Errors go to stderr and leave stdout empty.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from memplan import __version__
from memplan.errors import MemplanError, near_names

COMMANDS = {
    "estimate": "Estimate a fine-tune's memory, or inference's, term by term.",
    "fits": "Say what fits on a card: models by ways to fine-tune them.",
    "compare": "Compare fine-tunes, term by term.",
    "export": "Write a plan or a recipe as the files that a trainer takes.",
    "gpus": "List the cards that the catalog knows.",
    "inspect": "Show what a model is made of.",
    "models": "List the models that the catalog knows.",
    "plan": "Choose the recipe, and a rank for every module, that fit a card.",
    "simulate": "Simulate a fine-tune's memory, or inference's, byte for byte.",
    "report": "Write a report to look at: HTML, and Markdown with figures.",
    "ui": "Serve the calculator as a web page on this machine.",
    "profile": "Measure a real short fine-tune, in a process of its own.",
    "runs": "List measured runs, show one, or import others'.",
    "validate": "Compare predictions with everything that was measured.",
    "explain": "Show why a measured run differs from its prediction.",
    "doctor": "Measure this machine's card, once, and say what is missing.",
    "why-not": "Say why a recipe does not fit a card, and what would change it.",
    "completion": "Print the script by which a shell completes words.",
    "schema": "Print the JSON schema of a recipe, a plan, the output or a run.",
}
"""Each command with its line of help; its module is of the same name."""

COMPLETION_VARIABLE = "_MEMPLAN_COMPLETE"
"""What a shell sets when it asks for words (click.shell_completion)."""

EXIT_INTERNAL_ERROR = 3
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are modules of `memplan.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(
            f"memplan.commands.{cmd_name.replace('-', '_')}"
        )
        command: click.Command = module.command
        if COMPLETION_VARIABLE in os.environ:
            from memplan.commands.completion import attach

            return attach(command)
        return command

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = ", ".join(near_names(name, COMMANDS)) or ", ".join(COMMANDS)
            ctx.fail(f"command: {name!r} is unknown; near: {near}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="memplan")
def group() -> None:
    """How much GPU memory a fine-tune takes, before it runs."""


def main() -> NoReturn:
    """Runs the command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold bytes that are no text, and a terminal few characters.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    asked = os.environ.get(COMPLETION_VARIABLE)
    if asked:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(group, {}, "memplan", COMPLETION_VARIABLE, asked))
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of a command line; everything it says is printed.

    Stands in for `click.Group.main`, which makes exit 1 of a broken pipe: here that
    would mean that a run does not fit.
    """
    try:
        with group.make_context("memplan", list(arguments)) as context:
            code = group.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except MemplanError as error:
        click.echo(f"memplan: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("memplan: interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as `head` does; nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last place that can say a word
        _show_internal_error(error)
        return EXIT_INTERNAL_ERROR
    return code if isinstance(code, int) else 0


def _show_internal_error(error: Exception) -> None:
    if os.environ.get("MEMPLAN_TRACEBACK"):
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    click.echo(
        f"memplan: internal error: {type(error).__name__}: {first_line} "
        "(MEMPLAN_TRACEBACK=1 shows where)",
        err=True,
    )
