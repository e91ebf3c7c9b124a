import pytest
from pydantic import ValidationError

from eri.config.problems import schema_problems
from eri.config.schema import Config
from eri.config.strict_yaml import KeyPath, Problem, parse


def problems(text: str) -> dict[KeyPath, Problem]:
    document = parse(text, lambda line, column: f"{line}:{column}")
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(document.value)
    return schema_problems(caught.value, document)


def test_the_alternatives_of_a_setting_are_told_as_one() -> None:
    found = problems("model: demo\ndata: x\ntrain: {steps: 0}\n")
    assert list(found) == [("train", "steps")]
    problem = found["train", "steps"]
    assert problem.where == "3:9"
    assert problem.what == "train.steps is 0; allowed: 'auto' or a number of at least 1"
    assert problem.hint == "train.steps: optimizer steps; auto derives them from the images"


@pytest.mark.parametrize("value", ["[150]", "{auto: 1}", "[[auto]]", "'0'"])
def test_a_value_of_another_kind_is_told_whole(value: str) -> None:
    found = problems(f"model: demo\ndata: x\ntrain: {{steps: {value}}}\n")
    assert list(found) == [("train", "steps")]
    assert found["train", "steps"].what.endswith("; allowed: 'auto' or a whole number")


def test_a_short_form_is_told_as_it_was_written() -> None:
    found = problems("model: ''\ndata: ''\n")
    assert [(problem.where, problem.what) for problem in found.values()] == [
        ("1:1", "model is ''; allowed: a path"),
        ("2:1", "data is ''; allowed: a path"),
    ]


def test_what_only_follows_from_another_problem_is_not_told() -> None:
    assert list(problems("model: demo\ndata: 3\n")) == [("data",)]
    assert list(problems("model: demo\ndata: x\nadapter: {rank: x}\n")) == [("adapter", "rank")]


def test_a_long_value_is_cut() -> None:
    found = problems(f"model: demo\ndata: x\ntrain: {{lr: '{'x' * 500}\x85'}}\n")
    assert "…(+" in found["train", "lr"].what
    assert len(found["train", "lr"].what) < 150
