from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memplan import model_source
from memplan.errors import HubError, InputError, UnknownNameError
from memplan.hub import LARGEST_CONFIG_BYTES
from memplan.model_source import ModelSource, catalog_names, read_config

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}

CATALOG = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "one/Twin",
    "two/twin",
    "01-ai/Yi-1.5-9B",
    "gpt2",
    "openai/gpt2",
)


@pytest.fixture(autouse=True)
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalog of a few names, each in its config, and an empty working folder."""
    folder = tmp_path / "profiles" / "architectures"
    folder.mkdir(parents=True)
    for name in CATALOG:
        entry = {
            "name": name,
            "config": {"model_type": "llama", "_name": name},
            "facts": {"parameters": len(name)},
        }
        file = folder / f"{name.replace('/', '--')}.json"
        file.write_text(json.dumps(entry))
    monkeypatch.setattr(model_source, "profiles_path", lambda: tmp_path / "profiles")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of a hub that has one model, new/model."""
    models: list[str] = []

    def fetch_config(model_id: str) -> dict[str, object]:
        models.append(model_id)
        if model_id == "new/model":
            return dict(LLAMA)
        raise HubError("model", model_id, "is not on the hub", "check the spelling")

    monkeypatch.setattr(model_source, "fetch_config", fetch_config)
    return models


def refusal(model: str) -> str:
    with pytest.raises(InputError) as caught:
        read_config(model)
    assert caught.value.field == "model"
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text, "there is no way out"
    return text


def write_config(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(LLAMA).encode() if content is None else content)
    return path


def test_catalog_names_are_sorted_and_carry_their_owners() -> None:
    assert catalog_names() == sorted(CATALOG)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("META-LLAMA/llama-2-7B-HF", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf"),
        ("yi-1.5-9b", "01-ai/Yi-1.5-9B"),
        ("GPT2", "gpt2"),
        ("openai/gpt2", "openai/gpt2"),
        ("TWO/Twin", "two/twin"),
    ],
)
def test_catalog_name(model: str, name: str, asked: list[str]) -> None:
    assert read_config(model) == ModelSource(
        name=name,
        origin="catalog",
        config={"model_type": "llama", "_name": name},
        facts={"parameters": len(name)},
    )
    assert asked == []


def test_last_part_of_two_names_is_not_guessed() -> None:
    text = refusal("twin")
    assert "one/Twin" in text
    assert "two/twin" in text


def test_unknown_word_does_not_reach_the_hub(asked: list[str]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        read_config("llama2-7b")
    assert "Llama-2-7b-hf" in str(caught.value)
    assert "owner/name" in str(caught.value)
    assert asked == []


def test_near_name_that_is_offered_can_be_given() -> None:
    with pytest.raises(UnknownNameError, match=r"one/Twin.*") as caught:
        read_config("twins")
    assert "two/twin" in str(caught.value)


def test_name_with_an_owner_comes_from_the_hub(asked: list[str]) -> None:
    assert read_config("new/model") == ModelSource(
        name="new/model", origin="hub", config=LLAMA
    )
    assert asked == ["new/model"]


@pytest.mark.parametrize(
    "model",
    ["metallama/Llama-2-7b-hf", "meta-llama/Llama-2-7b", "mirror/llama-2-7b-hf"],
)
def test_hub_error_offers_what_is_very_near(model: str) -> None:
    with pytest.raises(HubError) as caught:
        read_config(model)
    assert "check the spelling; the catalog has " in str(caught.value)
    assert "meta-llama/Llama-2-7b-hf" in str(caught.value)


def test_hub_error_offers_nothing_far() -> None:
    with pytest.raises(HubError) as caught:
        read_config("mistralai/Mistral-7B-v0.1")
    assert str(caught.value).endswith("; check the spelling")


@pytest.mark.parametrize(
    ("model", "origin"),
    [
        (".", "folder"),
        ("./folder", "folder"),
        ("folder", "folder"),
        ("folder/", "folder"),
        ("folder/config.json", "file"),
        ("../work/folder", "folder"),
        ("other.json", "file"),
        ("no-suffix", "file"),
        ("deep/er", "folder"),
    ],
)
def test_path(model: str, origin: str, asked: list[str]) -> None:
    for path in ("config.json", "folder/config.json", "other.json", "no-suffix"):
        write_config(Path(path))
    write_config(Path("deep/er/config.json"))
    source = read_config(model)
    assert (source.name, source.origin, source.config) == (model, origin, LLAMA)
    assert source.path is not None
    assert source.path.is_file()
    assert asked == []


def test_absolute_path_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path / "home" / "model" / "config.json")
    assert read_config(str(file)).path == file
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert read_config("~/model").path == file


def test_folder_with_a_config_comes_before_the_catalog() -> None:
    write_config(Path("gpt2/config.json"))
    assert read_config("gpt2").origin == "folder"


def test_folder_without_a_config_does_not_hide_the_catalog() -> None:
    Path("gpt2").mkdir()
    assert read_config("gpt2").origin == "catalog"


@pytest.mark.parametrize("model", ["out", "out/adapter", "./out"])
def test_folder_without_a_config(model: str, asked: list[str]) -> None:
    Path("out/adapter").mkdir(parents=True)
    assert "is a folder without config.json" in refusal(model)
    assert asked == []


@pytest.mark.parametrize(
    "model",
    [
        "./missing",
        "missing.json",
        "/no/such/folder",
        "a/b/c",
        "missing/",
        "https://huggingface.co/new/model",
        "a\\b",
        "~nobody-of-this-name/model",
    ],
)
def test_missing_path_does_not_reach_the_hub(model: str, asked: list[str]) -> None:
    assert "does not exist" in refusal(model)
    assert asked == []


@pytest.mark.parametrize("model", ["", "  "])
def test_nothing_given(model: str) -> None:
    assert "is empty" in refusal(model)


@pytest.mark.parametrize("model", ["./a\0b", "./" + "x" * 5000, "/dev/null", "\0.json"])
def test_name_that_no_file_can_have(model: str) -> None:
    refusal(model)


@pytest.mark.parametrize("model", ["a\0b", "x" * 5000, "\udcff"])
def test_word_that_nothing_can_be(model: str) -> None:
    with pytest.raises(UnknownNameError):
        read_config(model)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"model_type": "lla', "is not valid JSON"),
        (b"{'model_type': 'llama'}", "is not valid JSON"),
        (b'{"a": "\xe9"}', "is not UTF-8 text"),
        (b"[1]", "is JSON, but not an object"),
        (b"3", "is JSON, but not an object"),
        (b"[" * 10**5, "is nested too deeply"),
        (b"<html>", "is a web page"),
        (b" " * (LARGEST_CONFIG_BYTES + 1), "is larger than 10 MB"),
    ],
)
def test_unusable_file(content: bytes, says: str) -> None:
    write_config(Path("bad/config.json"), content)
    assert f"'bad/config.json' {says}" in refusal("bad")


def test_unusual_files_that_are_fine() -> None:
    content = b'\xef\xbb\xbf{"eps": NaN, "model_type": "bert", "model_type": "llama"}'
    write_config(Path("config.json"), content)
    assert read_config("config.json").config["model_type"] == "llama"


def test_loop_of_links() -> None:
    Path("config.json").symlink_to("config.json")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(".")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(
        "config.json"
    )


def test_link_to_nothing() -> None:
    Path("config.json").symlink_to("gone")
    assert "does not exist" in refusal(".")


def test_pipe_is_not_waited_for() -> None:
    os.mkfifo("pipe.json")
    assert "is not a regular file" in refusal("pipe.json")


@pytest.mark.parametrize("path", ["config.json/", "/dev/zero"])
def test_what_is_no_file(path: str) -> None:
    if path.endswith("/"):
        Path(path).mkdir()
        path = "."
    assert "is not a regular file" in refusal(path)


def test_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(Path("config.json"))

    # Permission bits do not stop root, as whom containers run tests.
    def refuse(_path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_source, "read_content", refuse)
    assert "cannot be read (Permission denied)" in refusal("config.json")


def test_catalog_entry_without_a_config(catalog: Path) -> None:
    (catalog / "gpt2.json").write_text('{"name": "gpt2"}')
    assert "holds no config" in refusal("gpt2")


def test_remote_code_is_noted_until_it_is_trusted() -> None:
    remote = json.dumps(LLAMA | {"auto_map": {"AutoConfig": "code.Config"}})
    write_config(Path("config.json"), remote.encode())
    source = read_config(".")
    assert source.needs_remote_code
    assert ["auto_map" in note for note in source.notes] == [True]
    trusted = read_config(".", trust_remote_code=True)
    assert trusted.needs_remote_code
    assert trusted.notes == ()


@pytest.mark.parametrize("content", [b"{}", b'{"model_type": 3}'])
def test_missing_model_type_is_noted(content: bytes) -> None:
    write_config(Path("config.json"), content)
    source = read_config(".")
    assert not source.needs_remote_code
    assert ["model_type" in note for note in source.notes] == [True]


def test_plain_config_has_no_notes() -> None:
    assert read_config("new/model").notes == ()
