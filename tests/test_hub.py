from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, Answer, HubServer, config
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

import memplan
from memplan.errors import HubError
from memplan.hub import LARGEST_CONFIG_BYTES, fetch_config, parse_config

MODEL = "owner/model"
LLAMA = {"model_type": "llama", "num_hidden_layers": 2}

IMPATIENT_SECONDS = 0.3
PATIENT_SECONDS = 10
"""Longer than an answer of the loopback takes on a busy machine."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that huggingface_hub asks, with an empty cache and no token.

    Nothing that the library logs meanwhile may reach stderr.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shows bars without a terminal too
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    assert isinstance(handler, logging.StreamHandler)
    monkeypatch.setattr(handler, "stream", io.StringIO())
    with HubServer() as server:
        server.answers[MODEL] = config(**LLAMA)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_ETAG_TIMEOUT": PATIENT_SECONDS,
            "HF_HUB_DOWNLOAD_TIMEOUT": PATIENT_SECONDS,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server
        assert handler.stream.getvalue() == ""
    huggingface_hub.close_session()


@pytest.fixture
def impatient(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", IMPATIENT_SECONDS)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", IMPATIENT_SECONDS)


@pytest.fixture
def refused(hub: HubServer) -> Callable[[], str]:
    """Fetches the model and returns what the one-line HubError says."""

    def message() -> str:
        with pytest.raises(HubError) as caught:
            fetch_config(MODEL)
        assert caught.value.field == "model"
        assert caught.value.value == MODEL
        assert caught.value.__cause__ is not None
        text = str(caught.value)
        assert text.startswith(f"model: '{MODEL}' ")
        assert "\n" not in text
        assert "; " in text, "there is no way out"
        return text

    return message


def cached_files(folder: str) -> list[str]:
    kept = ("blobs", "snapshots")
    files = (file for file in Path(folder).rglob("*") if not file.is_dir())
    return [file.name for file in files if set(kept) & set(file.parts)]


def test_config_comes_and_nothing_else_does(
    hub: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fetch_config(MODEL) == LLAMA
    assert {request.path for request in hub.requests} == {
        f"/{MODEL}/resolve/main/config.json"
    }
    assert capfd.readouterr() == ("", "")


def test_revision_is_asked_for(hub: HubServer) -> None:
    fetch_config(MODEL, revision="v1.0")
    assert {request.path for request in hub.requests} == {
        f"/{MODEL}/resolve/v1.0/config.json"
    }


def test_one_word_is_a_legacy_id(hub: HubServer) -> None:
    hub.answers["gpt2"] = config(model_type="gpt2")
    assert fetch_config("gpt2") == {"model_type": "gpt2"}


def test_large_config_within_the_limit(hub: HubServer) -> None:
    hub.answers[MODEL] = config(labels="x" * (LARGEST_CONFIG_BYTES // 2))
    assert len(fetch_config(MODEL)["labels"]) == LARGEST_CONFIG_BYTES // 2


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "GatedRepo", "is gated"),
        (403, "GatedRepo", "is gated"),
        (401, "RepoNotFound", "is not on the hub, or is private"),
        (401, "", "needs a login"),
        (403, "", "is refused to this account"),
        (404, "RepoNotFound", "is not on the hub, or is private"),
        (404, "EntryNotFound", "has no config.json on the hub"),
        (404, "RevisionNotFound", "has no such revision"),
        (404, "", "is not on the hub"),
        (410, "", "was refused by the hub (HTTP 410)"),
        (429, "", "too many requests"),
        (500, "", "failed on the hub's side (HTTP 500)"),
        (503, "", "failed on the hub's side (HTTP 503)"),
    ],
)
def test_refusal_is_told_at_once(
    hub: HubServer,
    refused: Callable[[], str],
    status: int,
    code: str,
    says: str,
) -> None:
    # A hub may ask a client to wait for an hour, which huggingface_hub would do.
    headers = {"Retry-After": "3600"} | ({"X-Error-Code": code} if code else {})
    hub.answers[MODEL] = Answer(status=status, headers=headers)
    assert says in refused()
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_names_how_to_log_in(
    hub: HubServer, refused: Callable[[], str], status: int
) -> None:
    hub.answers[MODEL] = Answer(status=status, headers={"X-Error-Code": "GatedRepo"})
    text = refused()
    assert "licence" in text
    assert "`hf auth login`" in text
    assert "HF_TOKEN" in text


def test_disabled_model(hub: HubServer, refused: Callable[[], str]) -> None:
    message = {"X-Error-Message": "Access to this resource is disabled."}
    hub.answers[MODEL] = Answer(status=403, headers=message)
    assert "has been disabled" in refused()


@pytest.mark.parametrize(
    "model_id", ["owner/mo del", "a/b/c", "own--er/model", "/model", "owner/", ""]
)
def test_what_is_no_hub_id_is_not_asked_for(hub: HubServer, model_id: str) -> None:
    with pytest.raises(HubError, match="is not a hub id; a hub id has the form owner/"):
        fetch_config(model_id)
    assert hub.requests == []


@pytest.mark.usefixtures("impatient")
def test_slow_answer(hub: HubServer, refused: Callable[[], str]) -> None:
    hub.answers[MODEL] = Answer(body=b"{}", delay_seconds=60)
    start = time.monotonic()
    text = refused()
    assert "got no answer from the hub in time" in text
    assert "HF_HUB_ETAG_TIMEOUT" in text
    assert time.monotonic() - start < PATIENT_SECONDS


@pytest.mark.usefixtures("impatient")
def test_body_that_drips_for_ever_meets_the_deadline(
    hub: HubServer, refused: Callable[[], str]
) -> None:
    hub.answers[MODEL] = Answer(body=b" " * 10**4, delay_seconds=0.05, drips=True)
    start = time.monotonic()
    text = refused()
    assert "was not fetched from the hub in time" in text
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in text
    assert time.monotonic() - start < PATIENT_SECONDS


def test_refused_connection(hub: HubServer, refused: Callable[[], str]) -> None:
    hub.stop()
    start = time.monotonic()
    text = refused()
    assert "no connection" in text
    assert "refused" in text
    assert "HF_ENDPOINT" in text
    # huggingface_hub's own five waits before it gives up are 1, 2, 4, 8 and 8 seconds.
    assert time.monotonic() - start < PATIENT_SECONDS


@pytest.mark.parametrize(
    "endpoint", ["no-scheme", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://"]
)
def test_endpoint_that_is_no_address(
    refused: Callable[[], str], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert "could not be fetched" in refused()


def test_web_page_in_place_of_the_hub(
    hub: HubServer, refused: Callable[[], str]
) -> None:
    # A captive portal answers everything, without the hub's headers.
    hub.answers[MODEL] = Answer(body=b"<html>Log in</html>", commit=None)
    assert "does not answer as a hub does" in refused()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<!DOCTYPE html><html></html>", "is a web page, not JSON"),
        (b'{"model_type": "llama", "hid', "is not valid JSON"),
        (b'{"model_type": "\xff\xfe"}', "is not UTF-8 text"),
        (b'["llama"]', "is JSON, but not an object"),
        (b"null", "is JSON, but not an object"),
        (b"\n ", "is empty"),
        (b"", "is empty"),
        (b'{"a":' * 10**5, "is nested too deeply"),
    ],
)
def test_garbage_is_told_and_does_not_stay_in_the_cache(
    hub: HubServer, refused: Callable[[], str], body: bytes, says: str
) -> None:
    # The mended answer carries the same commit and ETag: a proxy broke the first.
    etag = {"ETag": '"etag"'}
    hub.answers[MODEL] = Answer(body=body, headers=etag)
    assert f"has a config.json that {says}" in refused()
    assert cached_files(constants.HF_HUB_CACHE) == []
    hub.answers[MODEL] = Answer(body=json.dumps(LLAMA).encode(), headers=etag)
    assert fetch_config(MODEL) == LLAMA


def test_file_that_says_it_is_too_large_is_not_downloaded(
    hub: HubServer, refused: Callable[[], str]
) -> None:
    size = {"X-Linked-Size": str(LARGEST_CONFIG_BYTES + 1)}
    hub.answers[MODEL] = Answer(body=b"{}", headers=size)
    assert "larger than 10 MB" in refused()
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_file_that_grows_too_large_is_given_up(
    hub: HubServer, refused: Callable[[], str]
) -> None:
    hub.answers[MODEL] = Answer(
        body=b" " * (2 * LARGEST_CONFIG_BYTES + 10**6), tells_size=False
    )
    assert "larger than 10 MB" in refused()
    assert cached_files(constants.HF_HUB_CACHE) == []


def test_second_call_needs_no_server(
    hub: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_config(MODEL)
    hub.stop()
    huggingface_hub.close_session()
    assert fetch_config(MODEL) == LLAMA
    assert capfd.readouterr() == ("", "")


def test_failing_hub_leaves_the_cache_to_serve(hub: HubServer) -> None:
    fetch_config(MODEL)
    hub.answers[MODEL] = Answer(status=503)
    assert fetch_config(MODEL) == LLAMA


def test_model_that_lost_its_config_is_not_served_from_the_cache(
    hub: HubServer, refused: Callable[[], str]
) -> None:
    fetch_config(MODEL)
    hub.answers[MODEL] = Answer(status=404, headers={"X-Error-Code": "EntryNotFound"})
    assert "has no config.json on the hub" in refused()


def test_offline_reads_the_cache_and_asks_nobody(
    hub: HubServer, refused: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_config(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch_config(MODEL) == LLAMA
    assert fetch_config(MODEL, revision=COMMIT) == LLAMA
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids asking the hub"):
        fetch_config("owner/other")
    assert hub.requests == []


def test_token_goes_in_the_header_of_the_hub_alone(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer() as storage:
        storage.answers["/blob"] = config(**LLAMA)
        hub.answers[MODEL] = Answer(
            status=302,
            headers={
                "Location": f"{storage.url}/blob",
                "X-Linked-Etag": '"blob"',
                "X-Linked-Size": str(len(json.dumps(LLAMA))),
            },
        )
        assert fetch_config(MODEL) == LLAMA
        assert [request.authorization for request in storage.requests] == [None]
        told = [*hub.requests, *storage.requests]
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
    for request in told:
        others = {k: v for k, v in request.headers.items() if k != "authorization"}
        assert "hf_secret" not in request.path
        assert "hf_secret" not in str(others)
    leaked = [f for f in Path(constants.HF_HUB_CACHE).rglob("*") if f.is_file()]
    assert not any(b"hf_secret" in file.read_bytes() for file in leaked)


def test_token_is_not_shown_when_it_is_refused(
    hub: HubServer, refused: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.answers[MODEL] = Answer(status=401)
    assert "hf_secret" not in refused()


def test_no_token_no_header(hub: HubServer) -> None:
    fetch_config(MODEL)
    assert {request.authorization for request in hub.requests} == {None}


def test_renamed_model_is_followed(hub: HubServer) -> None:
    hub.answers["old/model"] = Answer(
        status=307, headers={"Location": f"/{MODEL}/resolve/main/config.json"}
    )
    assert fetch_config("old/model") == LLAMA


def test_endless_redirect(hub: HubServer, refused: Callable[[], str]) -> None:
    hub.answers[MODEL] = Answer(
        status=307, headers={"Location": f"/{MODEL}/resolve/main/config.json"}
    )
    assert "redirects" in refused()


def test_cache_that_cannot_be_written(
    refused: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "HF_HOME" in refused()


def test_cause_is_kept(hub: HubServer) -> None:
    hub.answers[MODEL] = Answer(status=403)
    with pytest.raises(HubError) as caught:
        fetch_config(MODEL)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)


def test_what_the_library_logs_is_not_shown(hub: HubServer) -> None:
    hub.answers[MODEL] = Answer(body=b"{}", headers={"X-HF-Warning": "1; old client"})
    fetch_config(MODEL)


def test_log_that_was_asked_for_is_shown(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(library, "level", logging.INFO)
    hub.answers[MODEL] = Answer(body=b"{}", headers={"X-HF-Warning": "2; old client"})
    fetch_config(MODEL)
    (handler,) = library.handlers
    assert isinstance(handler, logging.StreamHandler)
    assert "old client" in handler.stream.getvalue()
    handler.setStream(io.StringIO())


ENVIRONMENT_SCRIPT = """
import json, sys
import memplan.hub, memplan.model_source
heavy = {"huggingface_hub", "torch", "transformers", "numpy"} & set(sys.modules)
config = memplan.hub.fetch_config("owner/model")
print(json.dumps([sorted(heavy), config]))
"""


def test_environment_is_read_and_the_client_is_imported_late(tmp_path: Path) -> None:
    with HubServer() as server:
        server.answers[MODEL] = config(**LLAMA)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE_"))
        } | {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(memplan.__file__).parents[1]),
        }
        run = subprocess.run(
            [sys.executable, "-c", ENVIRONMENT_SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        tokens = {
            request.authorization
            for request in server.requests
            if request.path.startswith(f"/{MODEL}")
        }
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout) == [[], LLAMA]
    assert tokens == {"Bearer hf_secret"}
    assert (tmp_path / "cache" / "models--owner--model").is_dir()


def test_config_with_a_byte_order_mark_and_constants() -> None:
    parsed = parse_config(b'\xef\xbb\xbf{"a": 1, "a": Infinity}')
    assert parsed == {"a": float("inf")}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" " * (LARGEST_CONFIG_BYTES + 1), "is larger than 10 MB"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_unusable_content(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_config(content)
