"""What the torture tests share: a run that nobody disturbed, and what is needed for another."""

from pathlib import Path

import pytest

from tests.torture.sessions import ForkServer
from tests.torture.workload import Workload


@pytest.fixture(scope="session")
def straight(
    tmp_path_factory: pytest.TempPathFactory, shallow: Path, server: ForkServer
) -> Workload:
    """The workload, trained without a fault; its cache is in `folder / "cache"`; read only."""
    folder = tmp_path_factory.mktemp("straight")
    made = Workload.make(folder, shallow)
    session = server.start(
        "train", made.config, folder=folder / "session", env={"ERI_CACHE": str(folder / "cache")}
    )
    ended = session.wait()
    assert ended.code == 0, ended.err
    return made


@pytest.fixture
def workload(tmp_path: Path, straight: Workload, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A workload of its own that has not been trained, with the filled cache of `straight`."""
    monkeypatch.setenv("ERI_CACHE", str(straight.folder / "cache"))
    return Workload.make(tmp_path / "torture", straight.model, images=straight.folder / "photos")
