from pathlib import Path

import pytest
from pydantic import ValidationError

from eri.adapters import GROUPS
from eri.config import TARGETS, Config, json_schema
from eri.config.section import settings


def config(**sections: object) -> Config:
    return Config.model_validate({"model": "demo", "data": "photos", **sections})


def test_two_keys_are_enough() -> None:
    found = config()
    assert found.model.path == "demo"
    assert [source.path for source in found.data] == [Path("photos")]
    assert found.output == Path("runs/photos")
    assert (found.adapter.rank, found.adapter.alpha) == (16, 16.0)
    assert (found.train.steps, found.train.batch_size, found.train.lr) == ("auto", 4, 1e-4)
    assert (found.save.every, found.save.keep, found.sample.every) == (250, 2, 250)


def test_alpha_is_the_rank_unless_said() -> None:
    assert config(adapter={"rank": 8}).adapter.alpha == 8.0
    assert config(adapter={"rank": 8, "alpha": 1}).adapter.alpha == 1.0


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("photos/", "runs/photos"),
        ("/some/where/My photos", "runs/My-photos"),
        ("a/b/..", "runs/a"),
        ("/", "runs/run"),
        ([{"path": "one"}, {"path": "two"}], "runs/one"),
    ],
)
def test_the_output_is_named_after_the_first_folder(data: object, output: str) -> None:
    assert config(data=data).output == Path(output)


def test_a_mapping_stands_for_a_model_and_a_list_for_data() -> None:
    found = config(model={"path": "base"}, data=[{"path": "a", "resolution": 768}])
    assert found.model.path == "base"
    assert found.data[0].resolution == 768


def test_nothing_changes_after_it_was_read() -> None:
    with pytest.raises(ValidationError):
        config().train.lr = 1.0  # type: ignore[misc]


def test_every_setting_says_what_it_means_in_one_line() -> None:
    for path, field in settings(Config):
        assert field.description, path
        assert "\n" not in field.description, path


def test_the_settings_are_those_of_the_nested_sections() -> None:
    paths = {path for path, _ in settings(Config)}
    assert {("data", "path"), ("train", "lr"), ("sample", "prompts"), ("output",)} <= paths


def test_the_groups_of_modules_are_those_that_can_be_adapted() -> None:
    assert set(TARGETS) == set(GROUPS)


def test_the_schema_knows_the_short_forms() -> None:
    properties = json_schema()["properties"]
    assert {"type": "string"} in properties["model"]["anyOf"]
    assert {"type": "string"} in properties["data"]["anyOf"]
