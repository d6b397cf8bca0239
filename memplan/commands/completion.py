"""`memplan completion`: the script by which a shell completes memplan's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class

from memplan import registry
from memplan.fields import Choice, Flag, Part
from memplan.recipe import Recipe

VARIABLE = "_MEMPLAN_COMPLETE"
"""What the script sets when it asks for words (click.shell_completion)."""

SHELLS = ("bash", "zsh", "fish")

WHERE = {
    "bash": '~/.bashrc: eval "$(memplan completion bash)"',
    "zsh": '~/.zshrc: eval "$(memplan completion zsh)"',
    "fish": "~/.config/fish/completions/memplan.fish: memplan completion fish | source",
}
"""Into which file the script goes, and how."""


@click.command(epilog="\b\n" + "\n".join(WHERE.values()))
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script by which a shell completes words.

    They are commands, options, models, cards, and what a recipe's keys take. The shell
    evaluates it in a file of its own.
    """
    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(root, {}, "memplan", VARIABLE).source())


class Words(click.ParamType[str]):
    """A text of which some values are known, and completed."""

    name = "text"

    def __init__(self, words: Callable[[], Sequence[str]]) -> None:
        self._words = words

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The known values that begin so, or whose name after the slash does."""
        start = incomplete.casefold()
        return [
            CompletionItem(word)
            for word in self._words()
            if word.casefold().startswith(start)
            or word.rpartition("/")[2].casefold().startswith(start)
        ]


def attach(command: click.Command) -> click.Command:
    """The command, whose models, cards and recipe keys complete."""
    known = {"model": models, "models": models, "gpu_text": cards, **_of_recipe()}
    for parameter in command.params:
        if parameter.name in known and parameter.type is click.STRING:
            parameter.type = Words(known[parameter.name])
    return command


def models() -> list[str]:
    """The models of the catalog."""
    from memplan.model_source import catalog_names

    return catalog_names()


def cards() -> list[str]:
    """The cards of the catalog, as one word each, and `auto`."""
    from memplan import gpu

    return ["auto", *(_word(card.name) for card in gpu.gpus())]


def _word(card: str) -> str:
    """A card's name without the vendor's words and without spaces."""
    words = [word for word in card.split() if word not in _VENDORS_WORDS]
    return "-".join(words)


_VENDORS_WORDS = ("NVIDIA", "GeForce", "Tesla")


def _of_recipe() -> dict[str, Callable[[], Sequence[str]]]:
    """By key of a recipe: the values that it may have, where they are few."""
    return {
        field.name: words
        for field in dataclasses.fields(Recipe)
        if (words := _words_of(field.metadata["kind"])) is not None
    }


def _words_of(kind: object) -> Callable[[], Sequence[str]] | None:
    if isinstance(kind, Part):
        folder = kind.folder
        return lambda: registry.names(folder)
    if isinstance(kind, Choice):
        words = kind.words
        return lambda: words
    return (lambda: ("true", "false")) if isinstance(kind, Flag) else None
