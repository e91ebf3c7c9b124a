"""Hostile text in every place that a command reads: nothing of it may reach a terminal as it is."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eri.adapters import attach
from eri.errors import ModelError
from eri.formats.adapter_file import write_adapter
from eri.models import load_unet
from eri.run import start
from tests.torture.here import eri

HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http:evil\x1b\\here\x1b]8;;\x1b\\",
    "overwrite": "ok\rall is well",
    "newline": "one\neri: error: two",
    "tabs": "a\t\x0b\x0cb",
    "backspace": "safe\x08\x08\x08\x08evil",
    "delete": "a\x7fb",
    "C1": "a\x9b2Jb\x85c",
    "bidi": "abc\u202egnp.exe",
    "zero width": "a\u200bb\ufeff",
    "line separator": "a\u2028b\u2029c",
    "markup": "[red]x[bold][link=evil]",
    "format": "{0}%s%n{x!r}$(id)`id`",
    "surrogate": "\udcff\udc9b",
}
"""Each may be in the name of a file."""

SMALL = "data=[{path: photos, resolution: 64}]"

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command: its code and what it said, of which every character is fit to print."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str]:
        code = eri(*arguments, monkeypatch=monkeypatch)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        bad = [line for line in said.split("\n") if not line.isprintable()]
        assert not bad, ascii(bad)
        return code, said

    return command


@pytest.fixture(params=HOSTILE)
def text(request: pytest.FixtureRequest) -> str:
    return HOSTILE[request.param]


def test_in_arguments(command: Command, text: str) -> None:
    assert command(text)[0] == 2
    assert command("train", f"--{text}")[0] == 2
    assert command("train", f"{text}.yaml")[0] == 2
    assert command("train", "--model", text, "--data", text)[0] in {2, 4}
    assert command("train", "--model", "demo", "--data", "x", "--set", f"{text}={text}")[0] == 2
    assert command("sample", f"./{text}", "-p", text, "-o", f"{text}.png")[0] in {2, 4}
    assert command("init", text)[0] in {2, 3}


def test_in_names_of_files(command: Command, tmp_path: Path, text: str) -> None:
    file = tmp_path / f"{text}.safetensors"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    for words in (["inspect"], ["inspect", "--json"], ["export-lora", "-o", f"{text}.out"]):
        assert command(*words, file)[0] == 4
    assert command("export-lora", file, "-o", file)[0] in {4, 6}
    (tmp_path / text).mkdir()
    assert command("init", text)[0] in {0, 2}  # no path in a config holds what cannot be seen


def test_in_what_files_say(command: Command, tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.yaml"
    for content in (f"{text}: 1", f'model: "{text}"\ndata: 1', f"model: demo\noutput: {text}\n"):
        config.write_bytes(content.encode("utf-8", "surrogateescape"))
        assert command("train", config)[0] == 2
    if "\udcff" not in text:
        file = tmp_path / "tensors.safetensors"
        save_file({text: torch.zeros(1)}, file, metadata={text: text})
        assert command("inspect", file)[0] == 4
        assert command("export-lora", file, "-o", "out")[0] == 4


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_in_errors(
    command: Command, monkeypatch: pytest.MonkeyPatch, text: str, debug: list[str]
) -> None:
    def refuse(*given: object, **named: object) -> str:
        raise ModelError(text, where=text, hint=text, problems=[text]) from ValueError(text)

    def break_down(*given: object, **named: object) -> str:
        raise ValueError(text)

    monkeypatch.setattr(start, "init", refuse)
    code, said = command("init", "photos", *debug)
    assert code == 4
    assert ("Traceback" in said) == bool(debug)
    monkeypatch.setattr(start, "init", break_down)
    code, said = command("init", "photos", *debug)
    assert code == 1
    assert "ValueError" in said


def test_in_adapters_and_images_of_a_run(command: Command, tmp_path: Path, shallow: Path) -> None:
    """All of them at once: images that are trained on, with captions, and then broken ones."""
    adapter, photos = tmp_path / "adapter.safetensors", tmp_path / "photos"
    metadata = {text: text for text in HOSTILE.values() if "\udcff" not in text}
    pairs = attach(load_unet(shallow), rank=1).pairs()
    write_adapter(pairs, adapter, dialect="kohya", dtype=torch.float16, metadata=metadata)
    for words in (["inspect"], ["inspect", "--json"]):
        code, said = command(*words, adapter)
        assert code == 0
        assert "owned" in said
    photos.mkdir()
    for text in HOSTILE.values():
        Image.new("RGB", (64, 64)).save(photos / f"{text}.png")
        (photos / f"{text}.txt").write_text(text, errors="replace")
    plan = ("train", "--model", shallow, "--data", photos, "--dry-run", "--set", SMALL)
    assert command(*plan)[0] == 3  # control characters in captions
    for caption in photos.glob("*.txt"):
        text = caption.read_text().replace("\n", " ")
        caption.write_text("".join(c for c in text if unicodedata.category(c) != "Cc"))
    assert command(*plan)[0] == 0
    for text in HOSTILE.values():
        (photos / f"{text}.png").write_bytes(b"none")
    assert command(*plan)[0] == 3
