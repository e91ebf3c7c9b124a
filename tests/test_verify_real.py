"""scripts/verify-real: what it says of models that are sound, and that it sees what is not."""

import importlib
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from eri.adapters import attach, load_adapter
from eri.formats.adapter_file import write_adapter
from eri.models import load_text, load_unet, load_vae
from eri.run.base import look_at
from tests.families import save_sdxl, single_file
from tests.test_base_models import SSD_1B

ROOT = Path(__file__).parents[1]
NETS = ("U-Net", "VAE in", "VAE out", "text")
ADAPTERS = ("kohya", "diffusers")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("verify_real")


def verify(script: ModuleType, *arguments: object) -> Result:
    app = Typer()
    app.command()(script.main)
    small = ["--resolution", "64", "--device", "cpu"]
    return CliRunner().invoke(app, [*map(str, arguments), *small])


def table(result: Result) -> list[dict[str, str]]:
    """The rows of the Markdown table, by the names of its columns."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rows[1]) == {"---"}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_a_file_is_compared_trained_on_and_its_adapter_too(
    script: ModuleType, tmp_path: Path
) -> None:
    sdxl = save_sdxl(tmp_path / "sdxl", second_width=128)
    path = single_file(sdxl, tmp_path / "my|model.safetensors")
    result = verify(script, path, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "cpu" in result.stdout and "2 steps at 64²" in result.stdout
    (row,) = table(result)
    assert (row["file"], row["result"]) == ("my/model.safetensors", "ok")
    assert row["what it is"].startswith("sdxl: ")
    assert row["what it is"].endswith("; single file, compvis names, F32")
    assert all(float(row[column]) < 1e-3 for column in (*NETS, "pooled", *ADAPTERS))
    assert row["training"].startswith("exit 0, loss ")
    assert "my|model.safetensors: eri train: prediction epsilon: not told" in result.stdout
    assert "my|model.safetensors: diffusers has no configs that fit" in result.stdout


def test_other_families_and_folders_can_be_compared_without_training(
    script: ModuleType, sd15_real: Path, sd21: Path, tmp_path: Path
) -> None:
    sd21_file = single_file(sd21, tmp_path / "sd21.safetensors", dtype=torch.float16)
    shallow = save_sdxl(tmp_path / "shallow", second_width=128, **SSD_1B)
    shallow_file = single_file(shallow, tmp_path / "shallow.safetensors")
    result = verify(script, sd15_real, sd21_file, shallow_file, "--steps", 0)
    assert result.exit_code == 0, result.output
    assert "no training" in result.stdout
    rows = table(result)
    assert [row["result"] for row in rows] == ["ok"] * 3
    assert all(float(row[column]) < 1e-4 for row in rows for column in NETS)
    assert [row["pooled"] == "–" for row in rows] == [True, True, False]
    assert {row[column] for row in rows for column in ("training", *ADAPTERS)} == {"–"}
    assert "sd15_real: prediction told by: its scheduler_config.json" in result.stdout


def other_matrix(path: Path, **options: Any) -> Any:
    unet = load_unet(path, **options)
    unet.get_parameter("down.1.layers.0.attention.blocks.0.attn2.to_k.weight").mul_(1.1)
    return unet


def other_scale(path: Path, **options: Any) -> Any:
    vae = load_vae(path, **options)
    vae.scale *= 1.001
    return vae


def other_layer(path: Path, **options: Any) -> Any:
    return load_text(path, clip_skip=2, **options)


def test_nets_that_compute_something_else_are_seen(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, sd15_real: Path
) -> None:
    monkeypatch.setattr(script, "load_unet", other_matrix)
    monkeypatch.setattr(script, "load_vae", other_scale)
    monkeypatch.setattr(script, "load_text", other_layer)
    result = verify(script, sd15_real, "--steps", 0)
    assert result.exit_code == 1
    (row,) = table(result)
    assert row["result"] == "NOT VERIFIED"
    seen = [name for name in NETS if row[name].startswith("FAILED")]
    assert seen == ["U-Net", "VAE in", "text"]
    assert all(f"sd15_real: {column}: the error" in result.stdout for column in seen)


def test_an_adapter_that_does_something_else_is_seen(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, sd15_real: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    facts = look_at(str(sd15_real))
    adapter = attach(load_unet(sd15_real), rank=2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter.pairs(), path, dialect="kohya", dtype=torch.float32, metadata={})
    device = torch.device("cpu")
    inputs = script.unet_inputs(facts, device)
    with torch.no_grad():
        side = script.DiffusersSide(facts, device, tmp_path / "configs")
        (expected,) = side.adapters([path], inputs)
        (found,) = script.our_adapters(facts, [path], inputs)
        assert script.relative(found, expected) < 1e-4 < script.LARGEST_ADAPTER_ERROR

        def weaker(*arguments: Any) -> Any:
            loaded = load_adapter(*arguments)
            loaded.set_strength(0.95)
            return loaded

        monkeypatch.setattr(script, "load_adapter", weaker)
        (found,) = script.our_adapters(facts, [path], inputs)
        assert script.relative(found, expected) > script.LARGEST_ADAPTER_ERROR


def test_what_diffusers_cannot_load_is_not_passed_over(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, sd15_real: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no such thing\nmore")

    monkeypatch.setattr(script.DiffusersSide, "_loaded", fail)
    result = verify(script, sd15_real, "--steps", 0)
    assert result.exit_code == 1
    (row,) = table(result)
    assert {row[name] for name in NETS} == {"not compared"}
    assert row["result"] == "NOT VERIFIED"
    assert "U-Net: not compared, diffusers fails: OSError: no such thing\n" in result.stdout


def test_a_training_that_fails_is_not_passed_over(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, sd15_real: Path
) -> None:
    def run(command: list[str], **_: Any) -> CompletedProcess[str]:
        return CompletedProcess(command, 7, "", "eri: error: out of\nmemory")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(script.Verification, "_compare", lambda *_: None)
    result = verify(script, sd15_real, "--steps", 1)
    assert result.exit_code == 1
    (row,) = table(result)
    cells = [row[column] for column in ("training", *ADAPTERS)]
    assert cells == ["FAILED", "not compared", "not compared"]
    assert "training: ValueError: eri train ended with 7: eri: error: out of" in result.stdout


def test_a_file_that_is_no_model_has_its_row_too(script: ModuleType, tmp_path: Path) -> None:
    result = verify(script, tmp_path / "nothing.safetensors", "--steps", 0)
    assert result.exit_code == 1
    (row,) = table(result)
    assert (row["file"], row["result"]) == ("nothing.safetensors", "NOT VERIFIED")
    assert "no such model" in result.stdout


def test_an_error_that_is_no_number_fails(script: ModuleType) -> None:
    row = script.Row("x")
    row.measured("U-Net", float("nan"), 1.0)
    row.measured("text", script.relative(torch.ones(2), torch.ones(3)), 1.0)
    assert len(row.problems) == 2
