"""A run on a folder of hostile files: it says all that is wrong, or trains on the rest."""

from pathlib import Path

import pytest

from eri.config import Config, load_config
from eri.errors import DataError
from eri.run.train import train
from tests.data.hostile import LOCKED, build_hostile
from tests.run.conftest import Screen

BAD = 33  # images that cannot be read; three more have no caption
USED = 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = build_hostile(tmp_path_factory.mktemp("hostile") / "images")
    for name in LOCKED:  # what a lock does is shown where it holds for root too
        (top / name).chmod(0o700)
    (top / "unreadable.png").unlink()
    (top / "locked" / "a.png").unlink()
    return top


def config(folder: Path, model: Path, output: Path, settings: str = "") -> Config:
    path = output.parent / "config.yaml"
    path.write_text(
        f"model: {model}\n"
        f"data: [{{path: {folder}, resolution: 64, max_megapixels: 50{settings}}}]\n"
        f"output: {output}\n"
        "adapter: {rank: 2}\n"
        "train: {steps: 2, batch_size: 2}\n"
        "sample: {every: 0}\n"
    )
    return load_config(path)


def test_a_run_stops_before_it_begins_and_lists_every_bad_file(
    folder: Path, shallow: Path, tmp_path: Path, screen: Screen
) -> None:
    with pytest.raises(DataError) as caught:
        train(config(folder, shallow, tmp_path / "run"), screen.console)
    assert caught.value.exit_code == 3
    assert caught.value.what == "35 of 71 images and 2 rows of caption tables cannot be used"
    faults = [line for line in caught.value.problems if not line.startswith("note: ")]
    assert len(faults) == 35 + 2
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_a_run_trains_on_the_rest(
    folder: Path, shallow: Path, tmp_path: Path, screen: Screen
) -> None:
    settings = ", on_bad: skip, missing_caption: empty"
    train(config(folder, shallow, tmp_path / "run", settings), screen.console)
    assert (tmp_path / "run" / "run.safetensors").is_file()
    skipped = [line for line in screen.text.splitlines() if "; " in line and "note: " in line]
    assert len(skipped) == 34
