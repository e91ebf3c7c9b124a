import logging
import os
from pathlib import Path

import pytest

from eri.config import Config, load_config, make_config
from eri.errors import ConfigError

START = "model: demo\ndata: photos/\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | bytes, *overrides: str) -> Config:
    Path("a.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config("a.yaml", overrides)


def refused(text: str | bytes, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.usefixtures("folder")
class TestLoading:
    def test_a_config_is_read(self) -> None:
        config = load(START + "train: {lr: 1e-4, steps: 100}\nsample: {prompts: [no, 'a: b']}\n")
        assert config.train.lr == 1e-4
        assert config.train.steps == 100
        assert config.sample.prompts == ("no", "a: b")

    def test_a_byte_order_mark_is_no_part_of_the_first_key(self) -> None:
        assert load(b"\xef\xbb\xbf" + START.encode()).model.path == "demo"

    def test_windows_line_ends_and_paths(self) -> None:
        config = load("model: C:\\models\\base\r\ndata: 'C:\\new\\test'\r\n")
        assert config.model.path == "C:\\models\\base"
        assert config.data[0].path == Path("C:\\new\\test")

    def test_null_turns_clipping_off(self) -> None:
        assert load(START + "train: {max_grad_norm: null}").train.max_grad_norm is None

    def test_a_whole_number_is_a_number(self) -> None:
        lr = load(START + "train: {lr: 1}").train.lr
        assert lr == 1.0
        assert isinstance(lr, float)


BAD = [
    # text of the file; where; words of the message; words of the hint
    ("train: {lr: abc}", "3:9", "train.lr is 'abc'; allowed: a number", "learning rate"),
    ("train: {lr: '1e-4'}", "3:9", "train.lr is '1e-4'; allowed: a number", ""),
    ("train: {lr: 0}", "3:9", "train.lr is 0; allowed: a number greater than 0", ""),
    ("train: {lr: -1e-4}", "3:9", "is -0.0001; allowed: a number greater than 0", ""),
    ("train: {lr: .inf}", "3:9", "train.lr is inf; allowed: a finite number", ""),
    ("train: {lr: .nan}", "3:9", "train.lr is nan; allowed: a finite number", ""),
    ("train: {lr: 1e999}", "3:9", "allowed: a finite number", ""),
    ("train: {lr: true}", "3:9", "train.lr is true; allowed: a number", ""),
    ("train: {lr: null}", "3:9", "train.lr is null; allowed: a number", ""),
    ("train: {lr: 1,5}", "3:15", "unknown key train.5", ""),
    ("train: {lr: [1e-4]}", "3:9", "train.lr is a list; allowed: a number", ""),
    ("train:\n  steps: 0", "4:3", "steps is 0; allowed: 'auto' or a number of at least 1", ""),
    ("train:\n  steps: 1.5", "4:3", "is 1.5; allowed: 'auto' or a whole number", ""),
    ("train:\n  steps: many", "4:3", "is 'many'; allowed: 'auto' or a whole number", ""),
    ("train:\n  steps: {auto: 1}", "4:3", "train.steps is a mapping; allowed: 'auto'", ""),
    ("train:\n  steps: 99999999999", "4:3", "a number of at most 10,000,000", ""),
    ("train:\n  seed: " + "9" * 5000, "4:3", "allowed: a whole number", ""),
    ("train:\n  batch_size: 4.0", "4:3", "is 4.0; allowed: a whole number", ""),
    ("train:\n  deterministic: yes", "4:3", "is 'yes'; allowed: true or false", "bit-equal"),
    ("train:\n  precision: fp8", "4:3", "is 'fp8'; allowed: 'auto', 'fp32', 'bf16' or 'fp16'", ""),
    ("train:\n  max_grad_norm: 0", "4:3", "is 0; allowed: a number greater than 0", "null"),
    ("train: fast", "3:1", "train is 'fast'; allowed: a mapping of keys", ""),
    ("train: [lr]", "3:1", "train is a list; allowed: a mapping of keys", ""),
    ("train:", "3:1", "train is null; allowed: a mapping of keys", ""),
    ("train: {lrate: 1}", "3:9", "unknown key train.lrate; did you mean train.lr?", "batch_size"),
    ("train: {Steps: 1}", "3:9", "did you mean train.steps?", ""),
    ("adapter: {alpah: 1}", "3:11", "did you mean adapter.alpha?", "rank, alpha"),
    ("lr: 1e-4", "3:1", "unknown key lr; did you mean train.lr?", "model, data"),
    ("trian: {lr: 1}", "3:1", "unknown key trian; did you mean train?", ""),
    ("save: {on: 1}", "3:8", "unknown key save.on", ""),
    ("1: x", "3:1", "unknown key 1", ""),
    ('"\\e[2J": x', "3:1", "unknown key \\x1b[2J", ""),
    ("train: {memory: 8}", "3:9", "train.memory is 8; allowed: 'auto', 'fast' or 'small'", ""),
    ("train: {epochs: 0}", "3:9", "train.epochs is 0; allowed: a number of at least 1", ""),
    ("train: {workers: -1}", "3:9", "train.workers is -1; allowed: 'auto' or a number", ""),
    ("adapter: {rank: 0}", "3:11", "adapter.rank is 0; allowed: a number of at least 1", ""),
    ("adapter: {dropout: 1}", "3:11", "is 1; allowed: a number less than 1", ""),
    ("adapter: {targets: attn+conv}", "3:11", "is 'attn+conv'; allowed: some of attn, ff", ""),
    ("adapter: {targets: attn+attn}", "3:11", "each once", ""),
    ("adapter: {targets: ''}", "3:11", "is ''; allowed: some of attn", ""),
    ("sample: {prompts: a cat}", "3:10", "prompts is 'a cat'; allowed: a list", ""),
    ("sample: {prompts: [1]}", "3:20", "sample.prompts.0 is 1; allowed: a text", ""),
    ("sample:\n  prompts:\n  - #tag", "5:4", "sample.prompts.0 is null", ""),
    ("sample: {size: 100}", "3:10", "is 100; allowed: 'auto' or a multiple of 64", ""),
    ("sample: {every: -1}", "3:10", "at least 0", "0 makes none"),
    ("output: .", "3:1", "output is '.'; allowed: a folder whose name", ""),
    ("output: ..", "3:1", "output is '..'", ""),
    ("output: runs/-rf", "3:1", "output is 'runs/-rf'; allowed: a folder whose name", ""),
    ("output: runs/" + "狐" * 34, "3:1", "has at most 100 bytes", ""),
    *(
        (f"output: '{name}'", "3:1", "other systems take, too: without any of < > : ", "")
        for name in ("runs/a:b", "C:\\runs", "what?", "a|b", "CON", "runs/nul.v2", "a.", "a ")
    ),
    ("output: ''", "3:1", "output is ''; allowed: a path", ""),
    ("output: ~/runs", "3:1", "output is '~/runs'; allowed: the whole path", ""),
    ('output: "C:\\new"', "3:1", "output is 'C:\\x0aew'; allowed: a path in single quotes", ""),
    ("output: 3", "3:1", "output is 3; allowed: a path", ""),
    ("save: {every: 1, every: 2}", "3:18", "the key 'every' stands here and in line 3", "keep one"),
    ("save: &x {every: 1}", "3:7", "anchors", ""),
    ("save: *x", "3:7", "aliases", ""),
    ("<<: {a: 1}", "3:1", "merge keys", ""),
    ("save: !!python/name:os.system {}", "3:7", "tags", ""),
    ("save:\n\tevery: 1", "4:1", "tab", "spaces"),
    ("save: {every: 1", "4:1", "bracket of line 3", "close"),
    ("---\nmodel: x", "3:1", "second document", ""),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "place", "words", "hint"), BAD)
def test_a_bad_setting_is_named_with_its_line(text: str, place: str, words: str, hint: str) -> None:
    error = refused(START + text + "\n")
    said = "\n".join([str(error), *error.problems])
    assert f"a.yaml:{place}" in said
    assert words in said
    assert hint in (error.hint or "")


BAD_SOURCES = [
    ("", "data is ''; allowed: a path"),
    ("3", "data is 3; allowed: a folder, or a mapping"),
    ("null", "data is null; allowed: a folder"),
    ("{pth: y, path: x}", "unknown key data.0.pth; did you mean data.path?"),
    ("[]", "data is an empty list; allowed: a folder, or a mapping with the key path, or a list"),
    ("[photos]", "data.0 is 'photos'; allowed: a mapping of keys"),
    ("[{}]", "data.0.path is missing"),
    ("[{path: x}, {pth: y, path: z}]", "unknown key data.1.pth; did you mean data.path?"),
    ("[{path: x, repeats: 0}]", "data.0.repeats is 0; allowed: a number of at least 1"),
    ("[{path: x, flip: 1}]", "data.0.flip is 1; allowed: true or false"),
    ("[{path: x, resolution: 8}]", "resolution is 8; allowed: 'auto' or a number of at least 64"),
    ("[{path: x, on_bad: ignore}]", "is 'ignore'; allowed: 'stop' or 'skip'"),
    ("[{path: x, validation: 5}]", "data.0.validation is 5; allowed: a path"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("data", "words"), BAD_SOURCES)
def test_a_bad_source_is_named(data: str, words: str) -> None:
    error = refused(f"model: demo\ndata: {data or repr('')}\n")
    assert words in error.what
    assert "a.yaml:2:" in (error.where or "")


@pytest.mark.usefixtures("folder")
def test_one_folder_needs_no_list() -> None:
    Path("a.yaml").write_text("model: demo\ndata: {path: photos, flip: true}\n")
    (source,) = load_config(Path("a.yaml")).data
    assert (source.path.name, source.flip) == ("photos", True)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: x\n", "model is missing"),
        ("model: demo\n", "data is missing"),
        ("model: 3\ndata: x\n", "model is 3; allowed: 'demo', a path, or a mapping"),
        ("model: {}\ndata: x\n", "model.path is missing"),
        ("model: {path: x, prediction: x0}\ndata: x\n", "allowed: 'auto', 'epsilon' or 'v'"),
        ("model: {path: x, zero_terminal_snr: 1}\ndata: x\n", "allowed: 'auto' or true or false"),
        ("", "the config is empty"),
        ("# nothing\n", "the config is empty"),
        ("lr:1e-4", "expected `key: value`, found 'lr:1e-4'"),
        ("- model: demo", "expected a mapping of keys, found list"),
        ("42", "expected a mapping of keys, found int"),
        (b"model: demo\ndata: caf\xe9\n", "byte 21 is not UTF-8"),
        ("model: demo\n".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"#" * 1_000_001, "1000001 bytes; at most 1000000"),
    ],
)
def test_a_bad_file_is_refused(text: str | bytes, words: str) -> None:
    error = refused(text)
    assert words in error.what
    assert (error.where or "").startswith("a.yaml")
    assert error.hint


def test_bytes_that_are_not_utf8_are_placed(folder: Path) -> None:
    assert refused(b"model: demo\ndata: caf\xe9\n").where == "a.yaml:2"


def make_nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_nothing, "No such file"),
        (Path.mkdir, "the config is a folder"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_what_is_no_file_is_refused(folder: Path, make, words: str) -> None:
    make(folder / "b.yaml")
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(folder / "b.yaml")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(name)


def test_all_problems_are_listed_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = "model: demo\nsave: {every: 0, every: 1}\ntrain:\n  lrate: 1\n  steps: 0\ndata: 3\n"
    error = refused(text, "sample.steps=0")
    assert error.what == "5 settings cannot be used"
    assert error.where == "a.yaml"
    assert [problem.split(" ")[0] for problem in error.problems[:4]] == [
        "a.yaml:2:18:",
        "a.yaml:4:3:",
        "a.yaml:5:3:",
        "a.yaml:6:1:",
    ]
    assert error.problems[4].startswith("--set sample.steps: sample.steps is 0")


def test_a_thousand_problems_are_not_all_listed(folder: Path) -> None:
    error = refused("model: demo\ndata: photos\n" + "".join(f"k{n}: 1\n" for n in range(1000)))
    assert error.what == "1000 settings cannot be used"
    assert len(error.problems) == 101
    assert error.problems[-1] == "and 900 more"


@pytest.mark.usefixtures("folder")
class TestOverrides:
    def test_values_are_yaml(self) -> None:
        config = load(
            START + "train: {lr: 1, steps: 5}",
            "train.lr=1e-5",
            "sample.prompts=[a cat, 'a # dog']",
            "sample.negative=no",
            "train.max_grad_norm=",
            "output=runs/a=b",
            "data=other",
        )
        assert config.train.lr == 1e-5
        assert config.train.steps == 5
        assert config.sample.prompts == ("a cat", "a # dog")
        assert config.sample.negative == "no"
        assert config.train.max_grad_norm is None
        assert config.output == Path("runs/a=b")
        assert config.data[0].path == Path("other")

    def test_the_later_of_two_holds(self) -> None:
        assert load(START, "train.lr=1", "train.lr=2").train.lr == 2.0

    def test_an_override_mends_what_is_wrong_in_the_file(self) -> None:
        assert load(START + "train: {lr: x, lr: y}", "train.lr=2").train.lr == 2.0

    @pytest.mark.parametrize(
        ("override", "where", "words"),
        [
            ("train.lr=x", "--set train.lr", "train.lr is 'x'; allowed: a number"),
            ("train.lrate=1", "--set train.lrate", "did you mean train.lr?"),
            ("train.memory=tiny", "--set train.memory", "'auto', 'fast' or 'small'"),
            ("data.path.x=y", "--set data.path.x", "below a value that is not a mapping"),
            ("data=[{path: x, pth: y}]", "--set data", "unknown key data.0.pth"),
            ("train=[", "--set train", "bracket"),
            ("train=&a {lr: 1}", "--set train", "anchors"),
            ("model=@x", "--set model", "cannot begin with @"),
            ("train.lr", "--set", "'train.lr' is not key.path=value"),
            ("=3", "--set", "is not key.path=value"),
            ("..=3", "--set ..", "unknown key"),
            ("\x1b=3", "--set \\x1b", "unknown key \\x1b"),
            ("output=\udce9", "--set output", "character '\\udce9' is not allowed"),
        ],
    )
    def test_a_bad_override_is_named(self, override: str, where: str, words: str) -> None:
        error = refused(START, override)
        assert error.where == where
        assert words in error.what


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("sample:\n  negative: blurry #1\n", ["a.yaml:4:3"]),
        ("sample:\n  prompts:\n  - a cat # tabby\n  - 'a # dog'\n", ["a.yaml:5:5"]),
        ("train: {lr: 1} # fast\n", []),
        ("output: x # here\n", []),
    ],
)
def test_a_comment_in_a_prompt_is_warned_of(
    text: str, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(START + text)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == warned


class TestWithoutAFile:
    """`make_config`."""

    def test_it_is_what_a_file_of_two_lines_means(self, folder: Path) -> None:
        assert make_config(model="demo", data=["photos/"]) == load(START)
        changed = make_config(
            model="a: b", data=["x", "y"], output="runs/z", overrides=["train.lr=2"]
        )
        text = "model: 'a: b'\ndata: [{path: x}, {path: y}]\noutput: runs/z\ntrain: {lr: 2}\n"
        assert changed == load(text)

    @pytest.mark.parametrize(
        ("arguments", "overrides", "where", "words"),
        [
            ({"model": ""}, [], "--model", "model is ''; allowed: a path"),
            ({"data": [""]}, [], "--data", "data is ''; allowed: a path"),
            ({"data": ["a", "~/b"]}, [], "--data", "data.1.path is '~/b'; allowed: the whole path"),
            ({"output": "runs/.."}, [], "--output", "output is 'runs/..'; allowed: a folder whose"),
            ({}, ["train.lrate=1"], "--set train.lrate", "did you mean train.lr?"),
            ({}, ["data.path.x=y"], "--set data.path.x", "below a value that is not a mapping"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_option(
        self, arguments: dict, overrides: list[str], where: str, words: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            make_config(**{"model": "demo", "data": ["x"]} | arguments, overrides=overrides)
        assert caught.value.where == where
        assert words in caught.value.what


@pytest.mark.parametrize("data", ["photos", "[{path: photos}]", "[{path: photos, flip: false}]"])
def test_an_override_reaches_below_a_short_form(tmp_path: Path, data: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"model: demo\ndata: {data}\n")
    overrides = ["model.prediction=v", "data.flip=true", "data.caption.trigger=ohwx"]
    config = load_config(path, overrides)
    assert (config.model.path, config.model.prediction) == ("demo", "v")
    (source,) = config.data
    assert (source.path, source.flip, source.caption.trigger) == (Path("photos"), True, "ohwx")
    with pytest.raises(ConfigError, match=r"data.0.flip is 'maybe'.*\(--set data.flip\)"):
        load_config(path, ["data.flip=maybe"])


def test_of_several_folders_an_override_does_not_choose(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: demo\ndata: [{path: a}, {path: b}]\n")
    with pytest.raises(ConfigError, match=r"data\.flip: there are 2 folders; name one, as data\.0"):
        load_config(path, ["data.flip=true"])
    with pytest.raises(ConfigError, match=r"data\.2\.flip: there are 2 folders; .* data\.0\.flip"):
        load_config(path, ["data.2.flip=true"])
    config = load_config(path, ["data.1.flip=true", "data.0.caption.trigger=ohwx"])
    assert [source.flip for source in config.data] == [False, True]
    assert config.data[0].caption.trigger == "ohwx"
    assert load_config(path, ["data.1={path: c}"]).data[1].path == Path("c")


@pytest.mark.parametrize("data", ["a", "[{path: a}]"])
def test_an_only_folder_has_a_number_too(tmp_path: Path, data: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"model: demo\ndata: {data}\n")
    assert load_config(path, ["data.0.flip=true"]).data[0].flip
    with pytest.raises(ConfigError, match=r"there is 1 folder; name one, as data\.0\.flip"):
        load_config(path, ["data.1.flip=true"])
