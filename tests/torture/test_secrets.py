"""What a run leaves behind tells of nobody: no token, no home folder, no caption, no prompt."""

import shutil
from pathlib import Path

import pytest

from tests.torture.sessions import ForkServer
from tests.torture.workload import Workload

TOKEN = "hf_canarytokencanarytoken"
HOME, USER, CAPTION, PROMPT = "canaryhome", "canaryuser", "canarycaption", "canaryprompt"
ENVIRONMENT = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "USER": USER, "LOGNAME": USER}
HOOKS = "tests.torture.hooks"

MAY_HOLD = {
    # the settings, which are the owner's to keep, and what a run compares them with on resume
    HOME: {"config.yaml", "manifest.json"},
    # previews also say what they were drawn with, by which a run knows that they are its own
    PROMPT: {"config.yaml", "manifest.json", *(f"{step:06}-1.png" for step in range(3))},
}


@pytest.fixture
def home(tmp_path: Path, straight: Workload) -> Path:
    """A home folder with a model, images and captions."""
    folder = tmp_path / HOME
    shutil.copytree(straight.model, folder / "model")
    shutil.copytree(straight.folder / "photos", folder / "photos")
    for caption in (folder / "photos").glob("*.txt"):
        caption.write_text(f"a red {CAPTION}")
    return folder


def held(folder: Path, word: str) -> set[str]:
    """The names of files that hold a word."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.name for path in files if word.encode() in path.read_bytes()}


def test_a_run_and_an_export_tell_of_nobody(home: Path, server: ForkServer, tmp_path: Path) -> None:
    place, cache = tmp_path / "place", tmp_path / "cache"
    place.mkdir()
    env = ENVIRONMENT | {"HOME": str(home), "ERI_CACHE": str(cache)}
    settings = (
        "train={steps: 2, batch_size: 2}",
        f"data=[{{path: {home / 'photos'}, resolution: 64}}]",
        f"sample={{every: 1, steps: 1, size: 64, prompts: [{PROMPT}]}}",
        "save.every=1",
    )
    trained = server.start(
        *("train", "--model", home / "model", "--data", home / "photos", "--output", "disc"),
        *(word for setting in settings for word in ("--set", setting)),
        folder=tmp_path / "said",
        env=env,
        cwd=place,
    ).wait()
    assert trained.code == 0, trained.err
    exported = server.start(
        *("export-lora", "disc", "-o", "a.safetensors"),
        folder=tmp_path / "exported",
        env=env,
        cwd=place,
    ).wait()
    assert exported.code == 0, exported.err
    assert held(place, HOME) >= {"config.yaml"}  # so the search finds what is there
    for word in (TOKEN, HOME, USER, CAPTION, PROMPT):
        assert held(place, word) <= MAY_HOLD.get(word, set()), word
        assert not held(cache, word), word
    for word in (TOKEN, USER):
        assert word not in trained.out + trained.err + exported.out + exported.err


@pytest.mark.parametrize(
    ("error", "code"), [("ValueError", 1), ("eri.errors.DataError", 3), ("OSError", 5)]
)
def test_a_traceback_tells_no_token(
    workload: Workload, server: ForkServer, tmp_path: Path, error: str, code: int
) -> None:
    ended = server.start(
        *("train", workload.config, "--debug"),
        folder=tmp_path / "said",
        env=ENVIRONMENT,
        hook=f"{HOOKS}:fail",
        given=["eri.run.train.look_at", error, "nothing works"],
    ).wait()
    assert ended.code == code, ended.err
    assert "Traceback" in ended.err and "nothing works" in ended.err
    assert TOKEN not in ended.err + ended.out
    assert USER not in ended.err + ended.out
