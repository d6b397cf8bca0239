"""A model of which few layers are built, the others left out of their stack.

Those that are built keep their numbers, in their paths as in what they were told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

from memplan.architecture import Architecture
from memplan.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptLayers:
    """The layers of a stack that are built."""

    stack: str
    """The stack's path."""
    numbers: tuple[int, ...]
    left_out: Mapping[int, int]
    """By number of a layer that is not built: that of one like it that is."""


class FewLayers(nn.ModuleList):
    """A stack with gaps: its modules are numbered as in the whole, and counted as here.

    What is taken from it by index or slice is told by position, as from any list.
    """

    left_out: Mapping[int, int] = {}
    """As of KeptLayers."""

    @classmethod
    def of(cls, whole: nn.ModuleList, kept: KeptLayers) -> FewLayers:
        """The layers of a stack that are kept."""
        few = cls()
        for number in kept.numbers:
            few.add_module(str(number), whole[number])
        few.left_out = kept.left_out
        return few

    def _get_abs_string_index(self, idx: Any) -> str:
        names = list(self._modules)
        name: str = names[idx]
        return name


def build_few(
    build: Callable[[], nn.Module], architecture: Architecture, kept: KeptLayers
) -> nn.Module:
    """The model that `build` makes, with the other layers left out.

    They are not built, either, unless the model reads its layers while it is built.
    """
    try:
        with _building_few(architecture, kept):
            model = build()
        is_meant = _built(model, kept) == kept.numbers
    except InputError:
        is_meant = False
    if not is_meant:
        model = build()
    _leave_out(model, kept)
    return model


def whole_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules as the whole model has them, what is left out by what is alike.

    Names in a recipe speak of the whole model.
    """
    for path, module in model.named_modules():
        yield path, module
        if isinstance(module, FewLayers):
            for number, other in module.left_out.items():
                layer = module.get_submodule(str(other))
                for name, part in layer.named_modules():
                    yield f"{path}.{number}.{name}".rstrip("."), part


def _leave_out(model: nn.Module, kept: KeptLayers) -> None:
    """Takes all other layers out, and what the config lists for each layer."""
    whole = model.get_submodule(kept.stack)
    assert isinstance(whole, nn.ModuleList)
    parent, _, name = kept.stack.rpartition(".")
    few = FewLayers.of(whole, kept)
    setattr(model.get_submodule(parent), name, few)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(whole):
            setattr(config, key, [value[number] for number in kept.numbers])


def _built(model: nn.Module, kept: KeptLayers) -> tuple[int, ...]:
    """The numbers of the stack's layers that were built."""
    whole = model.get_submodule(kept.stack)
    assert isinstance(whole, nn.ModuleList)
    return tuple(n for n, layer in enumerate(whole) if any(layer.children()))


@contextlib.contextmanager
def _building_few(architecture: Architecture, kept: KeptLayers) -> Iterator[None]:
    """Makes the classes of the stack's layers build those that are kept alone.

    Layers are told apart by the order in which they are built.
    """
    names = {
        block.name.partition(" ")[0]
        for block in architecture.blocks
        if block.stack == kept.stack
    }
    numbers = iter(range(architecture.layers_by_stack[kept.stack]))
    with contextlib.ExitStack() as stack:
        for cls in _module_classes(names):
            replacement = _building(cls, numbers, kept.numbers)
            stack.enter_context(mock.patch.object(cls, "__init__", replacement))
        yield


def _building(
    cls: type[nn.Module], numbers: Iterator[int], kept: Container[int]
) -> Callable[..., None]:
    """A constructor that leaves a module empty if it is not among those kept.

    Those that come after the stack's are built.
    """
    original: Callable[..., None] = cls.__init__

    def build(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        number = next(numbers, None) if type(module) is cls else None
        if number is None or number in kept:
            original(module, *args, **kwargs)
        else:
            nn.Module.__init__(module)

    return build


def _module_classes(names: Container[str]) -> list[type[nn.Module]]:
    """The classes of modules that are loaded, by their names."""
    found, left = [], [nn.Module]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__name__ in names:
            found.append(cls)
    return found
