"""A ragged set through whole runs: counted from `log.jsonl`, as its owner could."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from eri.config import Config, load_config
from eri.errors import Stopped
from eri.run.train import train
from tests.run.conftest import Screen, stop_after

ASPECTS = [(1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (5, 4), (4, 5), (2, 1), (1, 2)]
SIZES = [13, 14, 10]  # images of the folders, whose repeats are 1, 2 and 3
EPOCHS = 2


def photos(folder: Path) -> list[Path]:
    """37 pictures of nine aspects, and of two sizes, in three folders."""
    folders = [folder / name for name in ("once", "twice", "thrice")]
    numbers = iter(range(sum(SIZES)))
    for path, size in zip(folders, SIZES, strict=True):
        path.mkdir(parents=True)
        for number in islice(numbers, size):
            wide, high = ASPECTS[number % 9]
            side = 150 if number % 5 else 90
            scale = side / min(wide, high)
            shape = round(wide * scale), round(high * scale)
            Image.new("RGB", shape, (number * 6, 99, 0)).save(path / f"{number:02}.png")
            (path / f"{number:02}.txt").write_text("red, blue, gold")
    return folders


def config_of(folder: Path, model: Path, name: str, **settings: object) -> Config:
    path = folder / f"{name}.yaml"
    if not (folder / "data").exists():
        photos(folder / "data")
    data = [
        {"path": str(folder / "data" / source), "repeats": repeats, "resolution": 128}
        | {"flip": True, "caption": {"shuffle_tags": True, "drop": 0.1}}
        for repeats, source in enumerate(("once", "twice", "thrice"), start=1)
    ]
    content = {
        "model": str(model),
        "data": data,
        "output": str(folder / name),
        "adapter": {"rank": 1, "targets": "attn"},
        "train": {"epochs": EPOCHS, "batch_size": 4, **settings},
        "save": {"every": 1000},
        "sample": {"every": 0},
    }
    path.write_text(json.dumps(content))
    return load_config(path)


def log_of(config: Config) -> list[list[str]]:
    """The files of each step."""
    lines = (config.output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["files"] for line in lines]


def test_every_image_is_seen_exactly_as_often_as_stated_whoever_reads_and_after_a_stop(
    tmp_path: Path, shallow: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, shallow, "straight")
    train(config, screen.console)
    steps = log_of(config)
    seen = Counter(file for files in steps for file in files)
    assert len(seen) == 37
    for repeats, source in enumerate(("once", "twice", "thrice"), start=1):
        names = [path.name for path in (tmp_path / "data" / source).glob("*.png")]
        counts = {seen[f"{source}/{name}"] for name in names}
        assert counts == {EPOCHS * repeats}
    assert all(len(set(files)) == len(files) <= 4 for files in steps)
    samples = EPOCHS * (13 + 2 * 14 + 3 * 10)
    assert sum(map(len, steps)) == samples == 142
    assert f"{samples} samples" in screen.text
    assert f"{len(steps)} steps" in screen.text

    workers = config_of(tmp_path, shallow, "workers", workers=1)
    for end, now in ((9, workers), (18, workers.model_copy(update={"train": config.train}))):
        with monkeypatch.context() as patch:
            stop_after(patch, end)
            with pytest.raises(Stopped):
                train(now, Screen().console)
        assert log_of(workers) == log_of(config)[:end]
