"""What a run leaves as it goes: a checkpoint and an adapter of every save, old states deleted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from eri.adapters import Adapter
from eri.errors import NonFiniteError
from eri.files import require_space
from eri.formats.adapter_file import Shapes
from eri.run import checkpoints
from eri.run.adapter_files import finished_adapter, holds, lost_line, write_verified
from eri.train import TrainState

__all__ = ["Saves"]

DTYPE = torch.float16  # of the adapters; the checkpoints have float32


@dataclass(frozen=True, kw_only=True)
class Saves:
    """Writes into the folder of a run, which the caller has locked.

    Args:
        folder: of the run.
        keep: the checkpoints that stay; adapters all do.
        layers: of the net that is trained.
        made_with: what the numbers are computed with; see `eri.run.identity.made_with`.
        say: where people read.
    """

    folder: Path
    keep: int
    layers: Shapes
    made_with: Mapping[str, object]
    say: Callable[[str], None]

    def require_space(self, numbers: int, *, steps: int, every: int) -> None:
        """Refuse steps whose checkpoints and adapters the disk cannot hold.

        Args:
            numbers: that are trained.
            steps: still to come.
            every: steps between two saves.

        Raises:
            DiskError: fewer bytes are free.
        """
        saves = -(-steps // every) + 1  # the last is the finished adapter's
        require_space(self.folder, checkpoints.space_needed(numbers, saves=saves, keep=self.keep))

    def save(
        self,
        state: TrainState,
        adapter: Adapter,
        *,
        identity: Mapping[str, object],
        metadata: Mapping[str, str],
    ) -> None:
        """Write the state, then the adapter of its step, then delete old states.

        The state is first: its float32 holds every number, the adapter's float16 may not.
        """
        written = checkpoints.save(
            self.folder,
            state,
            adapter,
            identity=identity,
            metadata=metadata,
            made_with=self.made_with,
        )
        if written:
            self.say(f"saved    checkpoint-{state.step:06}")
        self.keep_adapter(state, adapter, metadata)
        checkpoints.prune(self.folder, self.keep)

    def keep_adapter(
        self, state: TrainState, adapter: Adapter, metadata: Mapping[str, str]
    ) -> None:
        """Write the adapter of a step, unless the one that is there is of these numbers.

        A kill may have come before it was written, and one of an earlier try that went another
        way may stand in its place.
        """
        name = f"{finished_adapter(self.folder).stem}-{state.step:06}.safetensors"
        path = self.folder / "adapters" / name
        if not holds(path, adapter.pairs(), metadata, dtype=DTYPE, layers=self.layers):
            self.write(adapter, path, metadata)

    def make_up(self, state: TrainState, adapter: Adapter, metadata: Mapping[str, str]) -> None:
        """Write what a kill left out, when a run goes on.

        What float16 cannot hold ends the save that meets it, but no run that goes on from there:
        its state is whole, and a smaller rate may bring the numbers back.
        """
        try:
            self.keep_adapter(state, adapter, metadata)
        except NonFiniteError as error:
            what = f"warning: step {state.step} has no adapter of its own: {error}"
            self.say("\n  ".join((what, *error.problems)))

    def write(self, adapter: Adapter, path: Path, metadata: Mapping[str, str]) -> None:
        """Write an adapter for people, and read it back."""
        lost = lost_line(adapter.pairs(), DTYPE, kept_by="eri export-lora --dtype fp32")
        if lost is not None:
            self.say(f"{lost} ({path.name})")
        path.parent.mkdir(exist_ok=True)
        write_verified(
            adapter.pairs(),
            path,
            dialect="kohya",
            dtype=DTYPE,
            metadata=metadata,
            layers=self.layers,
        )
