from pathlib import Path

import pytest

from eri.config import Config, load_config, make_config
from eri.config.section import settings
from eri.errors import ConfigError, DataError, OccupiedError
from eri.run.start import SHORT, init


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("My photos")
    folder.mkdir()
    return folder


def start(data: str = "My photos", **options: object) -> str:
    given = {"model": "demo", "output": None, "overwrite": False} | options
    return init(data, **given)  # type: ignore[arg-type]


def test_it_is_named_after_the_folder_and_says_what_to_do_next() -> None:
    said = start()
    assert said.startswith("My-photos.yaml: base model demo, images in My photos\n")
    assert said.endswith("eri train My-photos.yaml --dry-run")
    assert "\n#   eri train My-photos.yaml\n" in Path("My-photos.yaml").read_text()


def test_it_loads_back_to_the_defaults(tmp_path: Path) -> None:
    start(model="models/a: b.safetensors", output=Path("new/x y.yaml"))
    expected = make_config(model="models/a: b.safetensors", data=["My photos"])
    assert load_config("new/x y.yaml") == expected
    assert "#   eri train 'new/x y.yaml'\n" in Path("new/x y.yaml").read_text()


def test_it_is_short_and_each_setting_has_its_comment() -> None:
    start()
    lines = Path("My-photos.yaml").read_text().splitlines()
    assert len(lines) < 80
    assert "docs/configuration.md" in "".join(lines[:10])
    for number, line in enumerate(lines):
        if line and "#" not in line:
            assert "#" in lines[number - 1] or line == "- path: My photos", line


def test_the_short_settings_are_settings() -> None:
    assert set(SHORT) <= {".".join(path) for path, _ in settings(Config)}


def test_a_changed_rank_keeps_its_alpha() -> None:
    start()  # an alpha that was written out would stay behind a rank that is changed
    path = Path("My-photos.yaml")
    path.write_text(path.read_text().replace("rank: 16", "rank: 4"))
    assert load_config(path).adapter.alpha == 4.0


def test_what_is_there_is_kept_unless_it_may_be_replaced() -> None:
    Path("My-photos.yaml").write_text("mine")
    with pytest.raises(OccupiedError):
        start()
    assert Path("My-photos.yaml").read_text() == "mine"
    start(overwrite=True)
    assert load_config("My-photos.yaml").model.path == "demo"


def test_nothing_is_written_for_what_is_no_folder() -> None:
    Path("a.png").touch()
    with pytest.raises(DataError, match=r"no such folder.*nowhere"):
        start("nowhere")
    with pytest.raises(DataError, match=r"this is a file.*a\.png"):
        start("a.png")
    with pytest.raises(ConfigError, match="--model"):
        start(model="")
    assert not list(Path().glob("*.yaml"))


def test_hostile_names_stay_comments_and_reach_no_terminal() -> None:
    Path("a\u2028b\x1b").mkdir()
    with pytest.raises(ConfigError):
        start("a\u2028b\x1b")
    Path("model: x\u2028# y").mkdir()
    said = start("model: x\u2028# y", output=Path("b\u2028c.yaml"))
    assert "\u2028" not in said
    assert load_config("b\u2028c.yaml").data[0].path == Path("model: x\u2028# y")
