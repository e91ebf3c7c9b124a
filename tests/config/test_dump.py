import random
from pathlib import Path

import pytest

from eri.config import Config, dump_config, load_config, trajectory
from eri.config.section import settings

WORDS = """
no on null ~ true 1e-4 1E5 010 0o17 0x1F .5 .inf -.INF .nan 12:30:45 2026-11-20 1_000 = <<
&a *a !a @a %a `a` {a} [a] 'a' "a" a\\nb | > ? --- ... # - : 日本 🦊
"""
HIDDEN = ["", " a ", "\n", "a\nb", "a\tb", "\x85", "\u2028", "\ufeff", "\x7f", "\x1b"]
PHRASES = ["a: b", "a # b", "# a", "- a", "x" * 300, "word " * 60]
TEXTS = [*WORDS.split(), *HIDDEN, *PHRASES]


def loaded(text: str, folder: Path) -> Config:
    path = folder / "dumped.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def config(**sections: object) -> Config:
    return Config.model_validate({"model": "demo", "data": "photos", **sections})


def test_what_is_written_loads_back(tmp_path: Path) -> None:
    original = config(
        model="1e-4",
        data=[
            {"path": "no", "resolution": 768, "validation": "held out"},
            {"path": "2", "flip": True, "caption": {"trigger": "# a", "shuffle_tags": True}},
        ],
        output="runs/null",
        adapter={"rank": 4, "alpha": 0.1},
        train={"lr": 3e-7, "max_grad_norm": None, "steps": 10, "weight_decay": 1e-22},
        sample={"prompts": ["a: b", "c # d"], "guidance": 7},
    )
    assert loaded(dump_config(original), tmp_path) == original


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives(tmp_path: Path, text: str) -> None:
    original = config(sample={"prompts": [text], "negative": text})
    assert loaded(dump_config(original), tmp_path) == original


def test_numbers_survive_to_the_last_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(50):
        original = config(train={"lr": 10 ** rng.uniform(-30, 1)})
        assert loaded(dump_config(original), tmp_path).train.lr == original.train.lr


def test_the_written_file_reads_well() -> None:
    lines = dump_config(config()).splitlines()
    assert lines[:2] == ["# base model: a path, or a mapping", "model:"]
    assert lines[lines.index("  lr: 0.0001") - 1] == "  # learning rate at its highest"
    assert lines[lines.index("data:") + 1].startswith("# folder of images, searched")
    assert "- path: photos" in lines
    assert max(map(len, lines)) <= 105  # a comment of 100 below two groups


def test_every_setting_stands_below_what_it_means() -> None:
    text = " ".join(line.strip(" #") for line in dump_config(config()).splitlines())
    for path, field in settings(Config):
        dash = "- " if path == ("data", "path") else ""
        assert f"{field.description} {dash}{path[-1]}:" in text


def test_several_folders_are_explained_once() -> None:
    text = dump_config(config(data=[{"path": "a"}, {"path": "b", "repeats": 3}]))
    assert text.count("# times that an epoch shows each of the images") == 1
    assert "- path: b\n  repeats: 3\n" in text


def test_comments_behind_prompts_are_not_taken_for_a_part_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = config(sample={"prompts": ["a", "b"], "negative": "c"})
    assert loaded(dump_config(original), tmp_path) == original
    assert not caplog.records


def test_only_some_settings_can_be_written(tmp_path: Path) -> None:
    original = config(data=[{"path": "a", "caption": {"trigger": "x", "drop": 0.5}}])
    text = dump_config(original, only=["model.path", "data.path", "data.caption.trigger"])
    lines = [line for line in text.splitlines() if line and "#" not in line]
    assert lines == [
        *("model:", "  path: demo", "data:", "- path: a", "  caption:", "    trigger: x"),
    ]
    assert loaded(text, tmp_path).data[0].caption.drop == 0.0


def test_the_trajectory_is_what_changes_the_numbers() -> None:
    before = trajectory(config())
    assert before["train.lr"] == 1e-4
    assert before["data.0.path"] == "photos"
    assert before["adapter.rank"] == 16
    same = config(
        output="elsewhere",
        data=[{"path": "photos", "validation": "held"}],
        save={"every": 1, "keep": 9, "metadata": "full"},
        sample={"every": 0, "prompts": ["x"], "seed": 3},
        train={"steps": 99, "workers": 1, "memory": "small"},
    )
    assert trajectory(same) == before


NUMBERS = {
    "background": ({}, {}),  # of each image it is in the fingerprint of the images
    "variants": ({}, {"color": 0.1}),
    "unmasked_weight": ({}, {"mask": "alpha"}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_counts_only_where_what_it_goes_with_is_on(name: str) -> None:
    value = {"background": "#000000", "variants": 7, "unmasked_weight": 0.5}[name]
    for rules in NUMBERS[name]:
        before, after = (
            trajectory(config(data=[{"path": "photos", **rules, **more}]))
            for more in ({}, {name: value})
        )
        assert (before == after) == (not rules)


@pytest.mark.parametrize(
    ("rules", "same"),
    [
        ({}, True),
        ({"drop": 0.5, "lines": True}, True),
        ({"wildcards": True}, False),
        ({"shuffle_tags": True}, False),
        ({"drop_tags": 0.1}, False),
    ],
)
def test_variants_of_captions_count_where_chance_makes_some(rules: dict, same: bool) -> None:
    few, many = (
        trajectory(config(data=[{"path": "photos", "caption": {**rules, "variants": count}}]))
        for count in (2, 3)
    )
    assert (few == many) == same


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"data": "other"},
        {"data": [{"path": "photos"}, {"path": "more"}]},
        {"data": [{"path": "photos", "resolution": 512}]},
        {"adapter": {"rank": 8}},
        {"adapter": {"dropout": 0.1}},
        {"train": {"seed": 1}},
        {"train": {"lr": 2e-4}},
        {"train": {"accumulate": 2}},
        {"train": {"precision": "fp32"}},
    ],
)
def test_each_setting_of_the_training_is_in_the_trajectory(change: dict) -> None:
    assert trajectory(config(**change)) != trajectory(config())
