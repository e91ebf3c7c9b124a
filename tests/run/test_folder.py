import os
from collections.abc import Callable
from pathlib import Path

import pytest

from eri.config import Config
from eri.errors import DiskError, OccupiedError
from eri.run import folder
from eri.run.folder import claim, hold, own, refuse_existing


def test_a_free_place_is_taken_as_it_is_and_nothing_is_written(config: Config) -> None:
    assert claim(config, restart=False) == config
    assert claim(config, restart=True) == config
    assert not config.output.exists()


def test_restart_takes_the_first_free_name(config: Config) -> None:
    for name in ("disc", "disc-2"):
        (config.output.with_name(name)).mkdir()
    assert claim(config, restart=True).output.name == "disc-3"


def test_a_folder_of_something_else_is_not_touched(config: Config) -> None:
    config.output.mkdir()
    for name in ("thesis.docx", "config.yaml"):
        (config.output / name).touch()
        with pytest.raises(OccupiedError, match="not of a run"):
            claim(config, restart=False)
        (config.output / name).unlink()
    assert claim(config, restart=False) == config


def test_what_a_crash_left_in_a_run_is_swept_and_the_run_goes_on(config: Config) -> None:
    with own(config.output):
        (config.output / "samples").mkdir()
    for part in (config.output, config.output / "samples"):
        (part / ".writing-0123").touch()
    assert claim(config, restart=False) == config
    with own(config.output):
        assert not list(config.output.rglob(".writing-*"))


def test_a_file_in_the_way_is_named(config: Config) -> None:
    config.output.touch()
    with pytest.raises(DiskError, match="not a folder"):
        claim(config, restart=False)


def test_a_link_that_leads_nowhere_is_in_the_way_and_one_to_a_folder_is_not(
    config: Config,
) -> None:
    config.output.symlink_to("elsewhere")
    with pytest.raises(DiskError, match="a link that leads nowhere"):
        claim(config, restart=False)
    assert claim(config, restart=True).output.name == "disc-2"
    config.output.with_name("elsewhere").mkdir()
    assert claim(config, restart=False) == config


def test_what_was_made_for_a_run_that_wrote_nothing_is_deleted_again(
    config: Config, change: Callable[..., Config]
) -> None:
    above = config.output.parent / "runs"
    deep = change(config, output=above / "a" / "disc")
    with pytest.raises(ValueError, match="no model"), hold(deep) as (held, _):
        assert list(held.output.iterdir()) == [held.output / "run.lock"]
        raise ValueError("no model")
    assert not above.exists()
    with hold(deep, dry_run=True):
        assert not above.exists()
    with hold(deep) as (held, _):
        (held.output / "config.yaml").touch()
        (above / "b").mkdir()
    assert sorted(path.name for path in deep.output.iterdir()) == ["config.yaml", "run.lock"]


def test_a_folder_that_was_there_before_stays(config: Config) -> None:
    config.output.mkdir()
    with own(config.output):
        pass
    assert config.output.is_dir()


def test_a_folder_that_another_process_deletes_is_made_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, times = folder.lock, []

    def deleted_first(path: Path) -> object:
        times.append(path)
        if len(times) == 1:
            path.rmdir()
        return lock(path)

    monkeypatch.setattr(folder, "lock", deleted_first)
    with own(config.output):
        assert (config.output / "run.lock").is_file()
    assert len(times) == 2


def test_a_place_that_may_not_be_written_is_refused_before_anything_slow(
    config: Config, change: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = change(config, output=Path(config.output, "a", "b"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(DiskError, match="may not be written"):
        claim(deep, restart=False)


def test_an_output_is_replaced_only_if_that_was_said(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a.png"
    refuse_existing(output, False)
    assert output.parent.is_dir() and not output.exists()
    output.touch()
    refuse_existing(output, True)
    with pytest.raises(OccupiedError, match="exists already"):
        refuse_existing(output, False)
    with pytest.raises(OccupiedError, match="a folder stands"):
        refuse_existing(output.parent, True)


def test_a_link_in_the_place_of_an_output_counts_wherever_it_leads(tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    output.symlink_to("nowhere")
    with pytest.raises(OccupiedError, match="exists already"):
        refuse_existing(output, False)
    refuse_existing(output, True)
