import json
import shutil
from pathlib import Path

import pytest
import torch

from eri.errors import ModelError
from eri.run.base import load_base, look_at


def test_what_is_known_before_any_weight_is_read(sd15: Path) -> None:
    facts = look_at(str(sd15))
    assert (facts.name, facts.spec.family, facts.resolution) == ("sd15", "sd15", 64)
    assert facts.latent_factor == 8
    assert facts.noise.prediction_type == "epsilon"
    assert set(facts.parameters) == {"unet", "vae", "text_encoder"}


def test_the_parts_are_loaded_frozen_and_only_the_net_in_the_runs_type(sd15: Path) -> None:
    base = load_base(look_at(str(sd15)), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {p.dtype for p in base.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.model.parameters()} == {torch.float32}
    assert {p.dtype for p in base.text.model.parameters()} == {torch.float32}
    parts = (base.unet, base.vae.model, base.text.model)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_what_cannot_be_a_model_is_said(sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        look_at(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        look_at(str(tmp_path))
    weights = sd15 / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="not single files"):
        look_at(str(weights))
    page = tmp_path / "model.safetensors"
    page.write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"(?i)html|web page"):
        look_at(str(page))


def test_a_tokenizer_that_cannot_be_read_is_named(sd15: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    (folder / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        load_base(look_at(str(folder)), dtype=torch.float32, device=torch.device("cpu"))
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor"):
        look_at(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(sd15: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=part):
        look_at(str(folder))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"use_linear_projection": True}, "sd21"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "zero-terminal-SNR"),
    ],
)
def test_what_this_version_cannot_train_is_refused_by_name(
    sd15: Path, tmp_path: Path, part: str, change: dict, message: str
) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    file = {"unet": "config.json", "scheduler": "scheduler_config.json"}[part]
    path = folder / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        look_at(str(folder))
