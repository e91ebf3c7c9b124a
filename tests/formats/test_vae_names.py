from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from eri.formats.vae_names import ATTENTION, current
from eri.models import load_vae


def test_todays_names_stay() -> None:
    for name in ("encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_out.0.bias"):
        assert current(name) == name


def test_a_file_of_an_older_diffusers_is_read(sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text((sd15 / "vae" / "config.json").read_text())
    old = {}
    for name, tensor in load_file(sd15 / "vae" / "diffusion_pytorch_model.safetensors").items():
        for before, now in ATTENTION.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        old[name] = tensor
    assert sum(".query." in name for name in old) == 4
    save_file(old, folder / "diffusion_pytorch_model.safetensors")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load_vae(folder).encode(images), load_vae(sd15).encode(images))
