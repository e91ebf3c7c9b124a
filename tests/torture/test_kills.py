"""K1, K2 and K4: nothing that eri writes is ever torn by a kill, nor is what it reads."""

from pathlib import Path

import pytest

from tests.torture import kills
from tests.torture.sessions import ForkServer
from tests.torture.workload import Workload


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(
    server: ForkServer, tmp_path: Path
) -> None:
    done = kills.replacing(server, tmp_path, kills=50, size=8_000_000)
    assert done.kills == 50
    assert done.in_a_write > 2 and done.finished > 5  # else the moments say nothing


def test_checkpoints_and_adapters_are_whole_and_never_go_back(
    server: ForkServer, tmp_path: Path
) -> None:
    done = kills.checkpointing(server, tmp_path, kills=30)
    assert done.kills == 30
    assert done.in_a_write > 2 and done.finished > 5


def test_an_export_replaces_whole_files_and_leaves_its_source(
    server: ForkServer, straight: Workload, tmp_path: Path
) -> None:
    done = kills.exporting(server, tmp_path, straight.adapter, kills=6)
    assert done.kills == 6 and done.finished > 2


def test_what_is_cached_is_what_a_run_without_a_fault_caches(
    server: ForkServer, workload: Workload, straight: Workload
) -> None:
    assert kills.caching(server, workload, straight.folder / "cache", kills=3).kills == 3


@pytest.mark.parametrize("payload", [b"", bytes(40)])
def test_a_torn_file_would_be_seen(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "payload.bin"
    path.write_bytes(payload)
    assert not kills.is_whole(path)
