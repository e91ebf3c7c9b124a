"""D1 to D4: whatever a disk does, what was saved stays, nothing lies about, and it is told."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from eri.errors import DiskError
from eri.formats.adapter_file import write_adapter
from eri.run.export import export
from eri.run.saves import Saves
from tests.torture.faults import failing, filling
from tests.torture.invariants import Seen, assert_invariants, assert_message
from tests.torture.sessions import ForkServer
from tests.torture.victims import layers, small_state
from tests.torture.workload import Workload, digest, logged_steps

POINTS = 20  # at which a disk becomes full, over all that is written


class Saving:
    """A run with one checkpoint, and the next to be saved."""

    def __init__(self, run: Path) -> None:
        self.run = run
        run.mkdir()
        self.state, self.adapter = small_state()
        self.saves = Saves(folder=run, keep=1, layers=layers(), made_with={}, say=lambda text: None)
        self.save()
        self.before = Seen(1)

    def save(self) -> None:
        """Take a step and save it."""
        self.state.step += 1
        self.saves.save(self.state, self.adapter, identity={}, metadata={})


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    return Saving(tmp_path / "disc")


def test_a_disk_that_is_full_at_any_byte_keeps_the_old_state(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        left = filling(patch, 10**9)
        saving.save()
        total = 10**9 - left[0]
    assert total > 200_000
    saving.state.step = 2
    for point in range(POINTS):
        with monkeypatch.context() as patch, pytest.raises(DiskError, match="disk is full"):
            filling(patch, total * point // POINTS)
            saving.save()
        seen = assert_invariants(saving.run, before=Seen(2), killed=False)
        if seen.step == 3:  # it became full in the adapter, after the state
            assert not list((saving.run / "adapters").glob("*-000003.safetensors"))
            shutil.rmtree(saving.run / "checkpoint-000003")
        saving.state.step = 2
    saving.save()
    assert assert_invariants(saving.run).step == 3


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_export_onto_a_full_disk_keeps_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    _, adapter = small_state()
    source, output = tmp_path / "source.safetensors", tmp_path / "out" / "lora.safetensors"
    write_adapter(adapter.pairs(), source, dialect="kohya", metadata={}, modules=layers())
    export(source, output, dialect="kohya", precision="fp32", overwrite=False)
    before = output.read_bytes()
    for share in (0.0, 0.02, 0.3, 0.99):
        with monkeypatch.context() as patch, pytest.raises(DiskError, match="disk is full"):
            filling(patch, int(share * source.stat().st_size))
            export(source, output, dialect="kohya", precision=precision, overwrite=True)
        assert output.read_bytes() == before
        assert os.listdir(output.parent) == [output.name]


def test_a_flush_or_a_rename_that_fails_keeps_the_old_state(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0
    for owner, name, number, says in (
        (os, "fsync", errno.EIO, "read or write error"),
        (Path, "rename", errno.EXDEV, "on two disks"),
        (Path, "replace", errno.EDQUOT, "quota is used up"),
    ):
        for call in range(100):
            backup = saving.run.with_name("backup")
            shutil.copytree(saving.run, backup)
            with monkeypatch.context() as patch:
                called = failing(patch, owner, name, call=call, number=number)
                try:
                    saving.save()
                except DiskError as error:
                    assert says in str(error)
                    tried += 1
            assert_invariants(saving.run, before=saving.before, killed=False)
            shutil.rmtree(saving.run)
            backup.rename(saving.run)
            saving.state.step = 1
            if called() <= call:
                break
    assert tried > 15


def test_a_limit_on_files_is_named_and_nothing_is_lost(
    workload: Workload, straight: Workload, server: ForkServer
) -> None:
    workload.copy_run(straight)
    step = workload.take_back()
    before = assert_invariants(workload.run)
    size = (workload.run / f"checkpoint-{step:06}" / "optimizer.safetensors").stat().st_size
    session = server.start(
        "train",
        workload.config,
        folder=workload.folder / "said",
        hook="tests.torture.faults:limit_file_size",
        given=[size - 1],
    )
    ended = session.wait()
    assert ended.code == 5, ended.err
    assert "limit on file sizes" in ended.err and "ulimit -f" in ended.err
    assert assert_invariants(workload.run, ended, before=before).step == step
    ended = server.start("train", workload.config, folder=workload.folder / "said").wait()
    assert ended.code == 0
    assert_invariants(workload.run, ended, before=before)
    assert digest(workload.run) == digest(straight.run)


def test_a_run_whose_folder_is_deleted_says_so(workload: Workload, server: ForkServer) -> None:
    session = server.start("train", workload.config, folder=workload.folder / "said")
    assert session.wait_for(lambda: max(logged_steps(workload.run), default=0) >= 5)
    shutil.rmtree(workload.run, ignore_errors=True)
    began = time.monotonic()
    ended = session.wait()
    assert ended.code == 5, ended.err
    assert "no such file or folder" in ended.err
    assert time.monotonic() - began < 20
    assert_message(ended.err)
    assert not list(workload.run.rglob("*.safetensors"))
