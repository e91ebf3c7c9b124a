"""The loss on held-out images, before and after, and what became of it."""

import json
import math
from pathlib import Path

from eri.files import atomic_write
from eri.run.objective import ValidationLoss, validate
from eri.run.parts import Parts

__all__ = ["FILE", "Validation"]

FILE = "validation.json"  # of a run: the images' fingerprint, and the losses before and after
THIRDS = ("little noise", "some", "much")


class Validation:
    """Measures a run's held-out images with and without its adapter, and remembers both.

    Args:
        folder: of the run.
        parts: its net, its held-out images.
        images: fingerprint of the held-out images; a loss on other ones is measured anew.
        at_once: samples in a forward pass, at most.
    """

    def __init__(self, folder: Path, parts: Parts, images: str, *, at_once: int) -> None:
        self.path = folder / FILE
        self.parts = parts
        self.images = images
        self.at_once = at_once

    def before(self) -> ValidationLoss:
        """The base model's loss, measured unless it is on record."""
        recorded = self._recorded()
        if recorded is not None:
            return recorded
        self.parts.adapter.set_strength(0)
        try:
            loss = validate(self.parts.objective, self.parts.validation, at_once=self.at_once)
        finally:
            self.parts.adapter.set_strength(1)
        self._record(before=loss)
        return loss

    def compare(self) -> str:
        """Measure the adapter, record it, and say how it compares with the base model."""
        before = self.before()
        after = validate(self.parts.objective, self.parts.validation, at_once=self.at_once)
        self._record(before=before, after=after)
        thirds = ", ".join(
            f"{name} {_change(old, new)}"
            for name, old, new in zip(THIRDS, before.thirds, after.thirds, strict=True)
        )
        return (
            f"held-out loss {before.mean:.4f} before, {after.mean:.4f} after "
            f"({_change(before.mean, after.mean)}); by timestep: {thirds}"
        )

    def _recorded(self) -> ValidationLoss | None:
        """The base model's loss on these images, if the file is whole and speaks of them."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            if record["images"] != self.images:
                return None
            first, second, third = map(float, record["before"]["thirds"])
            return ValidationLoss(float(record["before"]["mean"]), (first, second, third))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _record(self, **losses: ValidationLoss) -> None:
        record = {"images": self.images} | {when: _plain(loss) for when, loss in losses.items()}
        with atomic_write(self.path) as file:
            file.write(json.dumps(record, indent=1, allow_nan=False).encode())


def _plain(loss: ValidationLoss) -> dict[str, object]:
    """A loss as JSON can hold it: null where it is not finite."""
    mean, *thirds = (n if math.isfinite(n) else None for n in (loss.mean, *loss.thirds))
    return {"mean": mean, "thirds": thirds}


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"
