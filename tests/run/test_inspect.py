import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from eri.adapters import attach
from eri.errors import ModelError
from eri.formats.adapter_file import Dialect, write_adapter
from eri.models import load_unet
from eri.run.inspect import as_json, as_text, inspect_path
from tests.families import single_file


def test_an_adapter(finished: Path) -> None:
    facts = inspect_path(finished / "disc.safetensors")
    assert facts["kind"] == "adapter"
    assert (facts["format"], facts["modules"], facts["rank"], facts["alpha"]) == (
        "kohya",
        192,
        2,
        2,
    )
    assert facts["dtype"] == "float16"
    assert facts["metadata"]["ss_network_dim"] == "2"
    assert facts["empty modules"] == 0
    assert set(facts["norm of ΔW"]) == {"down.0", "down.1", "down.2", "mid", "up.1", "up.2", "up.3"}


def test_the_norm_is_that_of_the_update(sd15: Path, tmp_path: Path) -> None:
    adapter = attach(load_unet(sd15), rank=2, alpha=1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter.pairs(), path, dialect="kohya", dtype=torch.float32, metadata={})
    middle = [layer.delta() for name, layer in adapter.layers.items() if name.startswith("mid.")]
    expected = torch.stack([delta.square().sum() for delta in middle]).sum().sqrt().item()
    assert inspect_path(path)["norm of ΔW"]["mid"] == pytest.approx(expected, rel=1e-5)


def test_an_adapter_that_does_nothing_is_noticed(sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    pairs = attach(load_unet(sd15), rank=2).pairs()
    write_adapter(pairs, path, dialect="diffusers", dtype=torch.float32, metadata={})
    facts = inspect_path(path)
    assert (facts["format"], facts["empty modules"]) == ("diffusers", 192)


def test_a_base_model(sd15: Path) -> None:
    facts = inspect_path(sd15)
    assert (facts["kind"], facts["family"], facts["resolution"]) == ("base model", "sd15", 64)
    assert facts["parameters"]["unet"] == sum(p.numel() for p in load_unet(sd15).parameters())
    assert facts["dtype"] == {"unet": "F32", "vae": "F32", "text_encoder": "F32"}
    assert len(facts["SHA-256"]) == 3
    assert inspect_path(Path("demo"))["family"] == "sd15"


def test_a_finished_run(finished: Path) -> None:
    facts = inspect_path(finished)
    assert (facts["kind"], facts["step"]) == ("run", 4)
    assert facts["checkpoint"] == "checkpoint-000004, verified"
    assert facts["next eri train"] == "says that the run is finished, and trains nothing"
    assert isinstance(facts["last loss"], float)
    assert set(facts["held-out loss"]) == {"images", "before", "after"}


def test_an_unfinished_run_and_a_damaged_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "disc")
    (run / "disc.safetensors").unlink()
    (run / "checkpoint-000004" / "state.json").write_text("{}")
    facts = inspect_path(run)
    assert facts["next eri train"] == "goes on from step 2 of 4"
    assert "state.json" in facts["damaged"][0] or "damaged" in facts["damaged"][0]
    with pytest.raises(ModelError, match="damaged"):
        inspect_path(run / "checkpoint-000004")


def test_a_checkpoint(finished: Path) -> None:
    facts = inspect_path(finished / "checkpoint-000002")
    assert (facts["kind"], facts["step"], facts["hashes"]) == ("checkpoint", 2, "all verified")
    assert facts["settings"]["train.batch_size"] == 2
    assert facts["adapter"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<!DOCTYPE html>", "HTML|web page"), (b"", "empty"), (b"\x80\x02}q\x00.", "pickle")],
)
def test_what_it_is_not_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"(?i){message}"):
        inspect_path(path)
    with pytest.raises(ModelError, match="no such file"):
        inspect_path(tmp_path / "absent")


def test_a_lora_of_every_dialect_is_an_adapter(sd15_real: Path, tmp_path: Path) -> None:
    pairs = attach(load_unet(sd15_real), rank=2).pairs()
    for dialect in get_args(Dialect):
        path = tmp_path / dialect
        write_adapter(pairs, path, dialect=dialect, metadata={})
        facts = inspect_path(path)
        assert (facts["kind"], facts["format"], facts["modules"]) == ("adapter", dialect, 192)
        assert facts["matched"] == "192 of 192 modules"


def test_tensors_of_a_lora_in_a_model_do_not_make_it_one(sd15_real: Path, tmp_path: Path) -> None:
    extra = {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 2)}
    path = single_file(sd15_real, tmp_path / "model.safetensors", extra=extra)
    assert inspect_path(path)["kind"] == "base model"


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing that eri knows") as refused:
        inspect_path(tmp_path)
    assert "model_index.json" in str(refused.value.hint)


def test_both_ways_of_telling_tell_everything(finished: Path) -> None:
    facts = inspect_path(finished / "disc.safetensors")
    assert json.loads(as_json(facts)) == facts
    assert as_json(facts).isascii()
    text = as_text(facts)
    assert "rank: 2\n" in text
    assert "  ss_network_dim: 2" in text


def test_text_is_made_for_reading() -> None:
    facts = {"a": 100_000, "b": 12_345, "c": True, "d": ["x", "y"], "e": ["x" * 60, "y"], "f": {}}
    assert as_text(facts | {"g": {"h": None}}).splitlines() == [
        "a: 100,000",
        "b: 12345",
        "c: yes",
        "d: x, y",
        "e:",
        f"  {'x' * 60}",
        "  y",
        "f:",
        "g:",
        "  h: None",
    ]
