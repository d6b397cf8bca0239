"""`fetch_config`: a model's config.json from the Hugging Face hub, nothing else of it.

huggingface_hub reads HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and the
time-outs from the environment when it is imported, which is when a config is fetched.
Left alone it retries a hub that is down for minutes (`hf_hub_download` and `http_get`
in its file_download.py) and sleeps as long as a `Retry-After` header says. So a
request without retries asks first, and the whole call has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan.errors import HubError

CONFIG_NAME = "config.json"

LARGEST_CONFIG_BYTES = 10 * 10**6
"""More than any config needs by a factor of ten: what is larger is something else."""

LARGEST_CONFIG_DEPTH = 64
"""More levels than any config has: the catalog's deepest has four."""

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_LOOK = "check the network and HF_ENDPOINT, or give the path of a config.json"

_PROBLEMS: Mapping[str | int, tuple[str, str]] = {
    "GatedRepoError": (
        "is gated: the hub wants its licence accepted",
        f"accept the licence on its page, then {_LOG_IN}",
    ),
    "RepositoryNotFoundError": (
        "is not on the hub, or is private",
        f"check the spelling; for a private model {_LOG_IN}",
    ),
    "DisabledRepoError": (
        "has been disabled on the hub",
        "give another model or the path of a config.json",
    ),
    "RevisionNotFoundError": (
        "has no such revision on the hub",
        "give a branch, a tag or a commit that it has",
    ),
    "LocalEntryNotFoundError": ("is not in the cache, and the hub failed", _LOOK),
    "EntryNotFoundError": (
        f"has no {CONFIG_NAME} on the hub",
        "give a transformers model: the base model of an adapter, the source of a GGUF",
    ),
    "HFValidationError": (
        "is not a hub id",
        "a hub id has the form owner/name, of letters, digits and single - _ .",
    ),
    "OfflineModeIsEnabled": (
        "is not in the cache, and HF_HUB_OFFLINE forbids asking the hub",
        "unset HF_HUB_OFFLINE or give the path of a config.json",
    ),
    "FileMetadataError": (
        "was asked of something that does not answer as a hub does",
        _LOOK,
    ),
    "ConfigTooLargeError": (
        f"has a {CONFIG_NAME} larger than {LARGEST_CONFIG_BYTES // 10**6} MB",
        "give the path of a config.json",
    ),
    "TimeoutException": (
        "got no answer from the hub in time",
        f"{_LOOK}; HF_HUB_ETAG_TIMEOUT=60 waits 60 seconds",
    ),
    "TimeoutError": (
        "was not fetched from the hub in time",
        f"{_LOOK}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer",
    ),
    "TransportError": ("could not be fetched: no connection ({reason})", _LOOK),
    401: ("needs a login, or the token is not valid", f"{_LOG_IN} anew"),
    403: (
        "is refused to this account",
        f"ask for access on its page, then {_LOG_IN}; the token must allow reading it",
    ),
    404: ("is not on the hub", "check the spelling and HF_ENDPOINT"),
    429: ("was refused: too many requests", f"wait a few minutes, or {_LOG_IN}"),
    400: ("was refused by the hub (HTTP {status})", _LOOK),
    500: ("failed on the hub's side (HTTP {status})", "try again later"),
    "Exception": (
        "could not be fetched from the hub ({reason})",
        "check the network, the HF_ variables and the cache folder (HF_HOME)",
    ),
}
"""What is wrong and the way out, by an error's class, one of its bases or its status.

The classes are huggingface_hub's (errors.py) and its HTTP client's, whose package
changed between its versions while the names stayed. 400 and 500 stand for the rest of
4xx and 5xx.
"""


class ConfigTooLargeError(Exception):
    """The hub's file is no config."""


def fetch_config(model_id: str, *, revision: str | None = None) -> dict[str, Any]:
    """The config of a model on the hub, or in its cache when the hub does not answer.

    A file that cannot be used is removed from the cache. Raises HubError.
    """
    try:
        path = Path(_download_in_time(model_id, revision))
        content = read_content(path)
    except Exception as error:
        raise _hub_error(model_id, error) from error
    try:
        return parse_config(content)
    except ValueError as error:
        _forget(path)
        raise HubError(
            "model",
            model_id,
            f"has a {CONFIG_NAME} that {error}",
            f"its cached copy was removed, so try again; {_LOOK}",
        ) from error


def read_content(path: Path) -> bytes:
    """A file's bytes, cut one byte after the largest config."""
    with path.open("rb") as file:
        return file.read(LARGEST_CONFIG_BYTES + 1)


def parse_config(content: bytes) -> dict[str, Any]:
    """The JSON object that a config file holds.

    Raises ValueError, whose text goes on from the file's name: "is empty".
    """
    if len(content) > LARGEST_CONFIG_BYTES:
        raise ValueError(f"is larger than {LARGEST_CONFIG_BYTES // 10**6} MB")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error
    if not text:
        raise ValueError("is empty")
    if text.startswith("<"):
        raise ValueError("is a web page, not JSON")
    config = _parse_json(text)
    if not isinstance(config, dict):
        raise ValueError("is JSON, but not an object")
    if _is_deeper(config, LARGEST_CONFIG_DEPTH):
        raise ValueError("is nested too deeply")
    return config


def _is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects lie in one another at more levels than that."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error


def _download_in_time(model_id: str, revision: str | None) -> str:
    """The path of the downloaded config, or TimeoutError.

    A slow server can keep every single read within its time-out for ever, and no
    setting bounds that. The thread is a daemon, so it does not outlive the program.
    """
    from concurrent.futures import Future

    from huggingface_hub import constants

    answer: Future[str] = Future()

    def run() -> None:
        try:
            answer.set_result(_download(model_id, revision))
        except Exception as error:  # noqa: BLE001 - raised again by answer.result
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    # Our request and the library's own ask for the file's metadata, then a download
    # and one more attempt at it.
    seconds = 2 * (constants.HF_HUB_ETAG_TIMEOUT + constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return answer.result(timeout=seconds)


def _download(model_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, file_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    with _quiet():
        try:
            metadata = file_download.get_hf_file_metadata(
                file_download.hf_hub_url(model_id, CONFIG_NAME, revision=revision),
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (EntryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:
            cached = file_download.try_to_load_from_cache(
                model_id, CONFIG_NAME, revision=revision
            )
            if isinstance(cached, str):
                return cached
            raise
        if (metadata.size or 0) > LARGEST_CONFIG_BYTES:
            raise ConfigTooLargeError
        return file_download.hf_hub_download(
            model_id, CONFIG_NAME, revision=revision, tqdm_class=_SilentBar
        )


class _SilentBar:
    """Shows no progress, and stops a download whose size the server did not tell.

    Has what `http_get` and `XetDownloadProgressReporter` ask of a tqdm bar.
    """

    def __init__(self, *_args: object, **_options: object) -> None:
        self.n = 0

    def __enter__(self) -> _SilentBar:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def update(self, num_bytes: int) -> None:
        self.n += num_bytes
        if self.n > LARGEST_CONFIG_BYTES:
            raise ConfigTooLargeError

    def set_postfix_str(self, *_args: object, **_options: object) -> None:
        pass


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the library logs in this thread off stderr: the error says it better.

    Unless its user asked for more than warnings (HF_HUB_VERBOSITY, HF_DEBUG).
    """
    import logging

    library = logging.getLogger("huggingface_hub")
    thread = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread != thread or library.level < logging.WARNING

    handlers = list(library.handlers)
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)


def _forget(pointer: Path) -> None:
    """Removes a snapshot's file and its blob from the cache, where that is allowed."""
    with contextlib.suppress(OSError):
        blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
        pointer.unlink()
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)


def _hub_error(model_id: str, error: Exception) -> HubError:
    # A LocalEntryNotFoundError only says that the cache could not stand in.
    is_local = type(error).__name__ == "LocalEntryNotFoundError"
    cause = (is_local and error.__cause__) or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    problem, remedy = next(
        _PROBLEMS[key] for key in _keys(cause, status) if key in _PROBLEMS
    )
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:160]
    return HubError(
        "model", model_id, problem.format(reason=reason, status=status), remedy
    )


def _keys(error: BaseException, status: int | None) -> Iterator[str | int]:
    """What an error may be found under in the table, the most telling first."""
    names = [base.__name__ for base in type(error).__mro__]
    yield from (name for name in names if name != "Exception")
    if status is not None:
        yield from (status, status // 100 * 100)
    yield "Exception"
