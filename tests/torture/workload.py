"""The run that the torture suite kills: 40 steps of the smallest model, saved every 4."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from eri.formats.tensors import load_tensors

__all__ = ["SAVE_EVERY", "STEPS", "Workload", "digest", "logged_steps"]

STEPS, SAVE_EVERY = 40, 4
IMAGES = 7  # an epoch never ends with a step


@dataclass(frozen=True)
class Workload:
    """A folder with images, a config and, once it was trained, a run.

    Args:
        folder: of all of it; made by `make`.
        model: the base model.
    """

    folder: Path
    model: Path

    @classmethod
    def make(
        cls, folder: Path, model: Path, *, steps: int = STEPS, images: Path | None = None
    ) -> "Workload":
        """Write images, or take those of another workload, so that one cache serves both."""
        made = cls(folder, model)
        folder.mkdir(parents=True, exist_ok=True)
        photos = images or folder / "photos"
        if images is None:
            _draw(photos)
        made.config.write_text(
            f"model: {model}\n"
            f"data: [{{path: {photos}, resolution: 64}}]\n"
            f"output: {made.run}\n"
            "adapter: {rank: 4, dropout: 0.1, targets: attn}\n"
            f"train: {{steps: {steps}, batch_size: 2, lr: 1e-3, schedule: cosine, warmup: 4}}\n"
            f"save: {{every: {SAVE_EVERY}, keep: 3}}\n"
            "sample: {every: 0}\n"
        )
        return made

    @property
    def config(self) -> Path:
        """Its config file."""
        return self.folder / "config.yaml"

    @property
    def run(self) -> Path:
        """The output folder."""
        return self.folder / "disc"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.run / "disc.safetensors"

    def copy_run(self, other: "Workload") -> None:
        """Take over a copy of another workload's run folder, as it is now."""
        shutil.copytree(other.run, self.run, symlinks=True)

    def take_back(self) -> int:
        """Forget the end of a finished run, as if a kill had come before it.

        Returns:
            The step that the run goes on from.
        """
        *_, before, last = sorted(self.run.glob("checkpoint-*"))
        shutil.rmtree(last)
        self.adapter.unlink()
        return int(before.name.removeprefix("checkpoint-"))


def digest(run: Path) -> dict[str, object]:
    """All that the end of a run is: adapter, optimizer, numbers, finished file and log.

    Timings in the log are left out, and the version and date that no number depends on.
    """
    newest = max(run.glob("checkpoint-*"))
    found: dict[str, object] = {
        f"{file}:{name}": tensor.numpy().tobytes()
        for file in ("adapter.safetensors", "optimizer.safetensors")
        for name, tensor in load_tensors(newest / file).items()
    }
    found["state"] = json.loads((newest / "state.json").read_text())
    finished = run / f"{run.name}.safetensors"
    found["finished"] = finished.read_bytes() if finished.exists() else None
    kept = ("step", "loss", "grad_norm", "lr", "files")
    found["log"] = [{key: line[key] for key in kept} for line in _log(run)]
    return found


def logged_steps(run: Path) -> list[int]:
    """The steps in a run's log; a line that a kill tore is left out."""
    return [line["step"] for line in _log(run)]


def _log(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        picture = Image.new("RGB", (64, 64), (30 * number, 80, 160))
        ImageDraw.Draw(picture).ellipse((8, 8, 40 + 3 * number, 50), fill=(250, 30 * number, 0))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red apple {number}")
