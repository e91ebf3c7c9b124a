from dataclasses import replace
from pathlib import Path

import pytest

from eri.formats.diffusers_folder import unet_config
from eri.models import UNet
from eri.models.spec import SD15, SD21, SDXL, build_spec
from eri.models.unet import UNetSpec
from tests.tiny import on_meta


@pytest.mark.parametrize(
    ("spec", "parameters", "tensors"),
    [(SD15, 859_520_964, 686), (SD21, 865_910_724, 686), (SDXL, 2_567_463_684, 1680)],
    ids=lambda value: getattr(value, "family", ""),
)
def test_stable_diffusion_has_its_published_size(
    spec: UNetSpec, parameters: int, tensors: int
) -> None:
    unet = on_meta(UNet, spec)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == tensors


def test_what_one_level_pushes_the_other_takes(sd15: Path) -> None:
    spec = build_spec(unet_config(sd15 / "unet"))
    assert [config.skip_channels for config in spec.up] == [
        (64, 64, 64),
        (64, 64, 32),
        (32, 32, 32),
        (32, 32, 32),
    ]
    assert [config.use_attention for config in spec.up] == [False, True, True, True]
    assert [config.downsample for config in spec.down] == [True, True, True, False]
    assert spec.mid.attend == (True, False)


def test_the_family_follows_from_the_structure(sd15: Path) -> None:
    fields = unet_config(sd15 / "unet")
    assert build_spec(fields).family == "sd15"
    assert build_spec(replace(fields, linear_projection=True)).family == "sd21"
    sdxl = replace(fields, linear_projection=True, pooled_dim=16, time_id_dim=8)
    assert build_spec(sdxl).family == "sdxl"


def test_added_conditions_are_those_of_diffusers(sd15: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    from eri.models import load_unet

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[2, 4, 4],
        cross_attention_dim=24,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    theirs.save_pretrained(tmp_path / "unet")
    ours = load_unet(tmp_path / "unet")
    assert (ours.spec.family, ours.spec.divisor) == ("sdxl", 4)
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3, 900]), torch.randn(2, 7, 24)
    pooled, ids = torch.randn(2, 16), torch.tensor([[512, 640, 0, 10, 512, 512]] * 2)
    with torch.no_grad():
        expected = theirs(
            x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
        found = ours(x, t, context, pooled, ids)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
