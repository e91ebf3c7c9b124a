import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eri.config import ModelSource
from eri.errors import ModelError
from eri.run.base import find_base, look_at
from tests.families import save_sd15_real, single_file
from tests.stub_hub import stub_hub

CPU = torch.device("cpu")


def test_what_is_known_before_any_weight_is_read(sd15: Path) -> None:
    facts = look_at(str(sd15))
    assert (facts.name, facts.spec.family, facts.resolution) == ("sd15", "sd15", 64)
    assert facts.latent_factor == 8
    assert facts.noise.prediction_type == "epsilon"
    assert set(facts.parts.parameters) == {"unet", "vae", "text_encoder"}


def test_the_parts_are_loaded_frozen_and_only_the_net_in_the_runs_type(sd15: Path) -> None:
    facts = look_at(str(sd15))
    unet = facts.load_unet(dtype=torch.bfloat16, device=CPU)
    vae, text = facts.load_vae(), facts.load_text(CPU)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in vae.model.parameters()} == {torch.float32}
    assert {p.dtype for p in text.model.parameters()} == {torch.float32}
    parts = (unet, vae.model, text.model)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_what_cannot_be_a_model_is_said(sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        look_at(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        look_at(str(tmp_path))
    weights = sd15 / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="no VAE") as refused:
        look_at(str(weights))
    assert "model.vae" in str(refused.value.hint)
    assert "text encoder" in refused.value.problems[0]
    page = tmp_path / "model.safetensors"
    page.write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"(?i)html|web page"):
        look_at(str(page))


def test_a_tokenizer_that_cannot_be_read_is_named(sd15: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    (folder / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        look_at(str(folder)).load_text(CPU)
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor"):
        look_at(str(folder))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", "unet"),
        ("vae", "no VAE"),
        ("text_encoder", "needs 1 text encoder and has none"),
        ("tokenizer", "tokenizer"),
        ("scheduler", "scheduler"),
    ],
    ids=lambda value: value.split()[0],
)
def test_a_missing_part_is_named(sd15: Path, tmp_path: Path, part: str, message: str) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=message):
        look_at(str(folder))


def test_other_files_supply_what_a_model_lacks(sdxl: Path, tmp_path: Path) -> None:
    alone = single_file(sdxl, tmp_path / "unet.safetensors", without=["vae", "text"])
    vae = single_file(sdxl, tmp_path / "vae.safetensors", without=["unet", "text"], vae="bare")
    with pytest.raises(ModelError, match="no VAE"):
        look_at(str(alone))
    with pytest.raises(ModelError, match="needs 2 text encoders and has none"):
        look_at(ModelSource(path=str(alone), vae=str(vae)))
    facts = look_at(ModelSource(path=str(alone), vae=str(vae), text=str(sdxl)))
    assert facts.spec.family == "sdxl"
    assert facts.parts.files["vae"] == [vae]
    assert facts.load_vae().scale == 0.13025
    assert facts.load_text(CPU).encode(["a cat"])[1] is not None


def test_text_encoders_of_another_family_are_refused(sdxl: Path, sd21: Path) -> None:
    with pytest.raises(ModelError, match="needs 2 text encoders and has 1 text encoder"):
        look_at(ModelSource(path=str(sdxl), text=str(sd21)))
    with pytest.raises(ModelError, match="no such file or folder"):
        look_at(ModelSource(path=str(sdxl), text="absent"))


def test_text_encoders_of_other_widths_are_refused(sd15: Path, sd21: Path) -> None:
    with pytest.raises(ModelError, match="is 32 wide, and the U-Net takes states of 64"):
        look_at(ModelSource(path=str(sd21), text=str(sd15)))


def test_a_file_named_for_its_vae_must_have_one(sdxl: Path, tmp_path: Path) -> None:
    alone = single_file(sdxl, tmp_path / "unet.safetensors", without=["vae", "text"])
    with pytest.raises(ModelError, match=r"unet\.safetensors has no VAE"):
        look_at(ModelSource(path=str(sdxl), vae=str(alone)))


def test_tensors_that_do_not_fit_are_found_before_any_weight_is_read(
    sd15: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match="1 tensors do not fit the model") as refused:
        look_at(str(folder))
    assert refused.value.problems == ("missing: conv_in.bias [32]",)


def test_a_unet_with_more_inputs_is_found_but_not_trained(tmp_path: Path) -> None:
    folder = save_sd15_real(tmp_path / "model", in_channels=9)
    assert find_base(str(folder)).spec.in_channels == 9
    with pytest.raises(ModelError, match="takes 9 channels: it is made for inpainting"):
        look_at(str(folder))


def test_what_is_unusual_in_a_file_is_told(sd15_real: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    extra = {"embedding_manager.x": torch.zeros(2)}
    single_file(sd15_real, path, dtype=torch.float8_e4m3fn, ema=True, loose=True, extra=extra)
    notes = "\n".join(look_at(str(path)).notes)
    assert "averaged copy of the U-Net (EMA)" in notes
    assert "1 tensors belong to no part and are not used: embedding_manager.x" in notes
    assert "in F8_E4M3; all are cast" in notes
    plain = single_file(sd15_real, tmp_path / "plain.safetensors", loose=True)
    assert look_at(str(plain)).notes == ()


def test_a_model_on_the_hub(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        path.relative_to(sdxl).as_posix(): path.read_bytes()
        for path in sdxl.rglob("*")
        if path.is_file()
    }
    said: list[str] = []
    with stub_hub(files, tmp_path, monkeypatch):
        facts = look_at("owner/name@v1.0", said.append)
    assert (facts.name, facts.spec.family) == ("name", "sdxl")
    assert any("owner/name" in line for line in said)
    assert facts.load_vae().scale == 0.13025


@pytest.mark.parametrize(
    ("part", "file", "key", "value"),
    [
        ("vae", "vae/config.json", "scaling_factor", 0.5),
        ("text_encoder", "text_encoder/config.json", "layer_norm_eps", 1e-3),
        ("text_encoder", "tokenizer/vocab.json", "zzz", 999),
        ("unet", "unet/config.json", "norm_eps", 1e-3),
    ],
)
def test_a_part_is_known_by_all_that_it_computes_from(
    part: str, file: str, key: str, value: float, sd15: Path, tmp_path: Path
) -> None:
    """What is kept of a part's results must not outlive a change of its config or tokenizer."""
    folder = shutil.copytree(sd15, tmp_path / "model")
    before = look_at(str(folder))
    assert before.hashes == look_at(str(sd15)).hashes
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {key: value}))
    after = find_base(str(folder))
    assert after.weights == before.weights
    changed = {name for name in before.hashes if after.hashes[name] != before.hashes[name]}
    assert changed == {part}


def test_a_vae_alone_is_known_with_the_scale_of_its_family(
    sd15: Path, sdxl: Path, tmp_path: Path
) -> None:
    vae = single_file(sdxl, tmp_path / "vae.safetensors", without=["unet", "text"], vae="bare")
    hashes = {look_at(ModelSource(path=str(m), vae=str(vae))).hashes["vae"] for m in (sd15, sdxl)}
    assert len(hashes) == 2
