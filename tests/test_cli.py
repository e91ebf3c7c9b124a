"""The command line as people meet it: in processes of their own, by exit code and by message."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eri
from eri.cli import app
from tests.run.conftest import save_photos, write_config
from tests.torture.sessions import Ended, ForkServer


def run_eri(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eri", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


Run = Callable[..., Ended]


@pytest.fixture
def run(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same in a fork of a process that has everything imported."""

    def run(*arguments: object, cwd: Path | None = None) -> Ended:
        said = tmp_path_factory.mktemp("said")
        return server.start(*arguments, folder=said, cwd=cwd).wait()

    return run


def test_help_names_every_command() -> None:
    for arguments in ([], ["--help"]):
        done = run_eri(*arguments)
        assert done.returncode == 0
        assert all(
            verb in done.stdout
            for verb in ("train", "init", "export-lora", "inspect", "sample", "doctor")
        )


SURFACE = {
    "train": {
        *("--model", "--data", "--output", "--set"),
        *("--dry-run", "--restart", "--allow-change"),
    },
    "init": {"--model", "--output", "--overwrite"},
    "export-lora": {"--output", "--format", "--dtype", "--overwrite"},
    "inspect": {"--json"},
    "sample": {
        *("--prompt", "--output", "--adapter", "--strength", "--negative", "--sampler"),
        *("--vae", "--text", "--prediction", "--zero-terminal-snr"),
        *("--steps", "--guidance", "--seed", "--size", "--overwrite"),
    },
    "doctor": set(),
}


@pytest.mark.parametrize(("verb", "options"), SURFACE.items())
def test_the_surface_is_what_it_was_agreed_to_be(run: Run, verb: str, options: set[str]) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert set(re.findall(r"(--[a-z][a-z-]+)", done.out)) == options | {"--help"}


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["train", "--help"], ["init", "--help"], ["--version"]),
        *(["train"], ["train", "--model", "demo"], ["init"], ["init", "."], ["nonsense"]),
    ],
)
def test_help_and_refusals_do_without_torch(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['eri', *{arguments!r}]\n"
        "import eri.cli\n"
        "try:\n    eri.cli.main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert run_eri("--version").stdout.strip() == eri.__version__


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train"], "Missing a config, or --model and --data"),
        (["train", "--model", "demo"], "--data is missing"),
        (["train", "--data", "x"], "--model is missing"),
        (["train", "--output", "x"], "Missing a config"),
        (["train", "a.yaml", "--data", "x"], "two ways to say the same (a.yaml)"),
        (["train", "a.yaml", "--model", "demo"], "two ways"),
        (["train", "a.yaml", "--output", "x"], "two ways"),
        (["train", "--model", "demo", "--data", "", "--set", "train.lr=1"], "data is ''"),
        (["init"], "Missing argument"),
        (["train", "--bogus"], "No such option: --bogus"),
        (["train", "absent.yaml"], "cannot be read"),
        (["export-lora", "a", "-o", "b", "--format", "zip"], "'zip' is not one of"),
        (["sample", "demo", "-p", "x", "-o", "y", "--steps", "0"], "--steps"),
        (["sample", "", "-p", "x", "-o", "y"], "no path of a model"),
        (["sample", "demo", "-p", "x", "-o", "y", "--strength", "nan"], "nan is not a finite"),
        (["sample", "demo", "-p", "x", "-o", "y", "--guidance", "nan"], "--guidance"),
        (["sample", "demo", "-p", "x", "-o", "y", "--guidance", "-3"], "--guidance"),
    ],
)
def test_a_refused_command_line_is_one_error_and_one_hint(
    run: Run, arguments: list[str], what: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.code == 2
    assert done.out == ""
    error, hint = done.err.splitlines()
    assert error.startswith("eri: error: ") and what in error
    assert hint.startswith("hint: ")


@pytest.fixture
def config(tmp_path: Path, shallow: Path) -> Path:
    return write_config(tmp_path, shallow)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_every_kind_of_bad_input_has_its_exit_code_before_any_weight_is_read(
    config: Path, run: Run, tmp_path: Path
) -> None:
    def refused(code: int, what: str) -> None:
        done = run("train", config)
        assert done.code == code, done.err
        assert re.match(rf"eri: error: .*{what}", done.err), done.err
        assert "Traceback" not in done.err
        assert "\nhint: " in done.err

    good = config.read_text()
    edit(config, "batch_size", "batchsize")
    refused(2, r"unknown key train\.batchsize; did you mean train\.batch_size\? .*config\.yaml:\d+")
    config.write_text(good.replace("lr: 1e-3", "lr: fast"))
    refused(2, "lr")
    config.write_text(re.sub("model: .*", f"model: {tmp_path / 'nothing'}", good))
    refused(4, "no such model")
    config.write_text(good.replace("photos,", "nowhere,"))
    refused(3, "no such folder")
    (tmp_path / "empty").mkdir()
    config.write_text(good.replace("photos,", "empty,"))
    refused(3, "no image")
    config.write_text(good)
    (tmp_path / "photos" / "0.txt").unlink()
    (tmp_path / "photos" / "1.png").write_bytes(b"not an image")
    refused(3, "2 of 7 images cannot be used")


def test_hostile_names_reach_no_terminal(config: Path, run: Run, tmp_path: Path) -> None:
    evil = tmp_path / "photos" / "\x1b]0;owned\x07[red].png"
    evil.write_bytes(b"not an image")
    done = run("train", config)
    assert done.code == 3
    assert "\x1b" not in done.err + done.out
    assert r"\x1b]0;owned" in done.err


def test_debug_shows_where_an_error_comes_from(run: Run, tmp_path: Path) -> None:
    done = run("train", tmp_path / "absent.yaml", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err


def test_train_inspect_export_and_sample_from_the_command_line(
    config: Path, run: Run, tmp_path: Path, shallow: Path
) -> None:
    trained = run_eri("train", config, "--set", "train.steps=1", "--set", "sample.every=0")
    assert trained.returncode == 0, trained.stderr
    disc = tmp_path / "disc"
    assert f"adapter  {disc / 'disc.safetensors'}" in trained.stdout.replace("\n", " ")
    looked = CliRunner().invoke(app, ["inspect", str(disc), "--json"])
    assert looked.exit_code == 0
    assert '"step": 1' in looked.stdout
    adapter = ("-o", str(tmp_path / "a.safetensors"), "--format", "diffusers")
    exported = CliRunner().invoke(app, ["export-lora", str(disc), *adapter])
    assert exported.exit_code == 0, exported.output
    drawn = run(
        *("sample", shallow, "-p", "a disc", "-o", tmp_path / "a.png", "--steps", 1),
        *("--adapter", tmp_path / "a.safetensors"),
    )
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_run_starts_without_a_file_and_goes_on_by_the_same_command(
    tmp_path: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.chdir(tmp_path)
    for name in ("photos", "more"):
        save_photos(tmp_path / name, count=2)
    command = ("--model", shallow, "--data", "photos", "--data", "more", "--set", "sample.every=0")
    quick = ("--set", "train.epochs=1", "--set", "train.batch_size=2", "--set", "adapter.rank=2")
    planned = train(*command, *quick, "--dry-run")
    assert "1 epoch x 4 samples = 4 samples" in planned
    assert not (tmp_path / "runs").exists()
    train(*command, *quick)
    run = tmp_path / "runs" / "photos"
    assert (run / "photos.safetensors").is_file()
    assert "# learning rate at its highest\n  lr: 0.0001\n" in (run / "config.yaml").read_text()
    assert "this run is finished" in train(*command, *quick)
    assert "this run is finished" in train(run / "config.yaml")


def test_doctor_finds_this_machine_in_order(run: Run) -> None:
    done = run("doctor")
    assert done.code == 0
    assert "Python 3." in done.out
