"""Small pictures, a config, and one finished run that the tests of the other verbs read."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from eri.config import Config, load_config
from eri.run.stop import StopSignals
from eri.run.train import train
from eri.train import MicroBatch, Pending, Step


class Screen:
    """A console that keeps what it was told."""

    def __init__(self) -> None:
        self.console = Console(file=io.StringIO(), width=200)

    @property
    def text(self) -> str:
        file = self.console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()


def save_photos(folder: Path, count: int = 5) -> Path:
    """Pictures of discs with captions; one of another aspect."""
    folder.mkdir(parents=True)
    for number in range(count):
        size = (64, 128) if number == 1 else (96, 96)
        picture = Image.new("RGB", size, (40 * number, 80, 160))
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill=(250, 30 * number, 0))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red disc {number}")
    return folder


def write_config(folder: Path, model: Path, *, steps: int = 4) -> Path:
    """A config that trains in a second or two."""
    photos = save_photos(folder / "photos")
    held_out = save_photos(folder / "held-out", count=2)
    path = folder / "config.yaml"
    path.write_text(
        f"model: {model}\n"
        f"data: [{{path: {photos}, validation: {held_out}, resolution: 128}}]\n"
        f"output: {folder / 'disc'}\n"
        f"adapter: {{rank: 2, dropout: 0.1}}\n"
        f"train: {{steps: {steps}, batch_size: 2, lr: 1e-3}}\n"
        "save: {every: 2}\n"
        "sample: {every: 2, steps: 2, prompts: [a red disc], size: 64}\n"
    )
    return path


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Make the run believe that it got a SIGTERM during its last of some steps."""
    signals: list[StopSignals] = []
    enter, call = StopSignals.__enter__, Step.__call__

    def entered(self: StopSignals) -> StopSignals:
        signals.append(self)
        return enter(self)

    def called(self: Step, batches: Sequence[MicroBatch], lr: float) -> Pending:
        if self.state.step + 1 == steps:
            signals[0].number = 15
        return call(self, batches, lr)

    monkeypatch.setattr(StopSignals, "__enter__", entered)
    monkeypatch.setattr(Step, "__call__", called)


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def config(tmp_path: Path, shallow: Path) -> Config:
    return load_config(write_config(tmp_path, shallow))


@pytest.fixture
def change() -> Callable[..., Config]:
    """A config with some sections changed, as `--set` would."""

    def changed(config: Config, **sections: object) -> Config:
        update = {
            name: getattr(config, name).model_copy(update=value)
            if isinstance(value, dict)
            else value
            for name, value in sections.items()
        }
        return config.model_copy(update=update)

    return changed


@pytest.fixture
def bare(config: Config, change: Callable[..., Config]) -> Config:
    """The same without previews and held-out images, which are most of so short a run's time."""
    data = tuple(source.model_copy(update={"validation": None}) for source in config.data)
    return change(config, data=data, sample={"every": 0})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sd15: Path) -> Path:
    """The folder of a finished run; read only."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERI_CACHE", str(folder / "cache"))
        train(load_config(write_config(folder, sd15)), Screen().console)
    return folder / "disc"
