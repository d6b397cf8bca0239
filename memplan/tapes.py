"""Where tapes are kept: the catalog's, the user's cache, or traced when first used.

A file of tapes holds a line for each regime, its key and the tape as JSON, compressed
as a whole; their tracks lie beside them in files of their own. Tracing needs torch;
what is traced is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeVar

from memplan import results, tape, track
from memplan.architecture import Architecture
from memplan.errors import InputError, MissingExtraError, UntracedError
from memplan.store import profiles_path, write_bytes
from memplan.tape import (
    CacheTape,
    LayerRegime,
    LayerTape,
    LossRegime,
    LossTape,
    ModelTape,
    Regime,
    Stretch,
)
from memplan.track import LayerTrack, LossTrack, ModelTrack

Tape = TypeVar(
    "Tape",
    ModelTape,
    LossTape,
    LayerTape,
    CacheTape,
    Stretch,
    ModelTrack,
    LossTrack,
    LayerTrack,
)

Kind = Literal["tapes", "tracks"]

KINDS: tuple[Kind, ...] = ("tapes", "tracks")

LAYERS = "layers"
"""The file of the tapes of linear layers, which belong to no model."""

INFERENCE = "inference"
"""The file of the tapes of inference alone: of linear layers, and of models' caches."""


class TapeFile:
    """The tapes of a model, or of linear layers, by their keys; or their tracks."""

    def __init__(self, name: str, kind: Kind) -> None:
        self._name = name
        self._kind = kind
        self._lines: dict[str, str] | None = None
        self._tapes: dict[str, Any] = {}

    def find(
        self,
        key: str,
        read: Callable[[Any], Tape],
        trace: Callable[[], Tape],
    ) -> Tape:
        """The tape of that key: read where it is known, else traced and kept."""
        if key in self._tapes:
            found: Tape = self._tapes[key]
            return found
        if self._lines is None:
            self._lines = read_lines(shipped_path(self._name, self._kind))
        if key not in self._lines:
            self._lines = read_lines(self._cached_path) | self._lines
        line = self._lines.get(key)
        made = read(json.loads(line)) if line is not None else self._trace(key, trace)
        self._tapes[key] = made
        return made

    @property
    def lines(self) -> dict[str, str]:
        """Every tape that was read or traced, by its key, as a file holds it."""
        return (self._lines or {}) | {
            key: text(made) for key, made in self._tapes.items()
        }

    @property
    def _cached_path(self) -> Path | None:
        folder = results.cache_folder("tapes")
        if folder is None:
            return None
        return folder / f"{self._name}-{_versions_digest()}.{self._kind}.gz"

    def _trace(self, key: str, trace: Callable[[], Tape]) -> Tape:
        made = trace()
        if self._cached_path is not None:
            lines = read_lines(self._cached_path) | {key: text(made)}
            with contextlib.suppress(OSError, InputError):
                self._cached_path.parent.mkdir(parents=True, exist_ok=True)
                write(self._cached_path, lines)
        return made


def model_tape(architecture: Architecture, regime: Regime) -> ModelTape:
    """The tape of a model's body; raises MissingExtraError where it needs torch."""

    def trace() -> ModelTape:
        made: ModelTape = _taping(architecture).trace_model(architecture, regime)
        return made

    return file_of(architecture).find(regime.key, tape.model_tape, trace)


def loss_tape(architecture: Architecture, regime: LossRegime) -> LossTape:
    """The tape of a model's head and loss; likewise."""

    def trace() -> LossTape:
        made: LossTape = _taping(architecture).trace_loss(architecture, regime)
        return made

    return file_of(architecture).find(regime.key, tape.loss_tape, trace)


def layer_tape(regime: LayerRegime) -> LayerTape:
    """The tape of a linear layer; likewise."""

    def trace() -> LayerTape:
        made: LayerTape = _taping(None).trace_layer(regime)
        return made

    return layers_file().find(regime.key, tape.layer_tape, trace)


def model_track(architecture: Architecture, regime: Regime) -> ModelTrack:
    """The track of a model's body; likewise."""

    def trace() -> ModelTrack:
        made: ModelTrack = _taping(architecture).track_model(architecture, regime)
        return made

    return file_of(architecture, "tracks").find(regime.key, track.model_track, trace)


def pass_tape(regime: LayerRegime, *, fused: bool) -> Stretch:
    """The forward of a linear layer without autograd; likewise."""

    def trace() -> Stretch:
        made: Stretch = _taping(None).trace_pass(regime, fused=fused)
        return made

    key = f"{regime.key} fused" if fused else regime.key
    return inference_file().find(key, tape.pass_tape, trace)


def cache_tape(architecture: Architecture) -> CacheTape:
    """The tape of what a model keeps from token to token; likewise."""

    def trace() -> CacheTape:
        made: CacheTape = _taping(architecture).trace_cache(architecture)
        return made

    return inference_file().find(name_of(architecture), tape.cache_tape, trace)


def inference_file() -> TapeFile:
    """The tapes of inference alone."""
    return _file(INFERENCE, "tapes")


def loss_track(architecture: Architecture, regime: LossRegime) -> LossTrack:
    """The track of a model's head and loss; likewise."""

    def trace() -> LossTrack:
        made: LossTrack = _taping(architecture).track_loss(architecture, regime)
        return made

    return file_of(architecture, "tracks").find(regime.key, track.loss_track, trace)


def layer_track(regime: LayerRegime) -> LayerTrack:
    """The track of a linear layer; likewise."""

    def trace() -> LayerTrack:
        made: LayerTrack = _taping(None).track_layer(regime)
        return made

    return layers_file("tracks").find(regime.key, track.layer_track, trace)


def layers_file(kind: Kind = "tapes") -> TapeFile:
    """The tapes of linear layers, or their tracks."""
    return _file(LAYERS, kind)


def file_of(architecture: Architecture, kind: Kind = "tapes") -> TapeFile:
    """The tapes of a model, which depend on its configuration alone, or tracks."""
    return _file(name_of(architecture), kind)


def name_of(architecture: Architecture) -> str:
    """The name of a model's tapes: models of one configuration share them."""
    known = _NAMES.get(id(architecture))
    if known is None or known[0] is not architecture:
        if len(_NAMES) >= _MOST_NAMES:
            _NAMES.clear()
        known = _NAMES[id(architecture)] = (architecture, _digest(architecture))
    return known[1]


_NAMES: dict[int, tuple[Architecture, str]] = {}
"""Names by the identity of an architecture, which is held so that it stays its own."""

_MOST_NAMES = 512


def _digest(architecture: Architecture) -> str:
    told = json.dumps(dict(architecture.config), sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    return f"{architecture.model_type}-{digest}"


def shipped_path(name: str, kind: Kind = "tapes") -> Path:
    """The file of the catalog in which the tapes of that name would be, or tracks."""
    return profiles_path() / "tapes" / f"{name}.{kind}.gz"


def text(made: Any) -> str:
    """A tape or a track as its line holds it."""
    of_track = isinstance(made, ModelTrack | LossTrack | LayerTrack)
    told = track.to_json(made) if of_track else tape.to_json(made)
    return json.dumps(told, separators=(",", ":"))


def write(path: Path, lines: Mapping[str, str]) -> None:
    """Writes tapes by key, replacing the file at once or not at all."""
    whole = "".join(f"{key}\t{lines[key]}\n" for key in sorted(lines))
    write_bytes(path, gzip.compress(whole.encode(), mtime=0))


@functools.cache
def _versions_digest() -> str:
    """A digest of what tapes depend on: memplan's own files, and its libraries."""
    from importlib import metadata

    told = [results.code_digest()]
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            told.append(metadata.version(package))
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:8]


_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


@functools.lru_cache(maxsize=1024)
def _file(name: str, kind: Kind) -> TapeFile:
    return TapeFile(name, kind)


def read_lines(path: Path | None) -> dict[str, str]:
    """Lines by key of a file of tapes; none where it is missing or broken."""
    if path is None or not path.is_file():
        return {}
    try:
        whole = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, ValueError):
        return {}
    pairs = (line.partition("\t") for line in whole.splitlines())
    return {key: line for key, _, line in pairs}


_TRACES: ContextVar[bool] = ContextVar("traces", default=True)


@contextlib.contextmanager
def known_only() -> Iterator[None]:
    """Raises UntracedError within, where a tape would have to be traced first."""
    token = _TRACES.set(False)
    try:
        yield
    finally:
        _TRACES.reset(token)


def _taping(architecture: Architecture | None) -> Any:
    needed_for = (
        "estimating this recipe, which nothing was read ahead for"
        if architecture is None
        else f"estimating {architecture.name} under this recipe for the first time"
    )
    if not _TRACES.get():
        remedy = "ask `memplan estimate`, which traces what it needs once"
        raise UntracedError(needed_for, "", "takes a trace", remedy)
    try:
        from memplan.simulator import taping
    except ModuleNotFoundError as error:
        raise MissingExtraError(needed_for, error.name or "torch", "torch") from error
    return taping
