"""Adapter files: other programs compute the same with them, and a file is used whole or refused."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eri.errors import ModelError, NonFiniteError, OccupiedError
from eri.formats.adapter_file import Dialect, LoRAPair, read_adapter, underflow, write_adapter
from eri.formats.header import read_header
from eri.formats.metadata import adapter_metadata
from eri.formats.unet_names import from_diffusers, to_diffusers

METADATA = adapter_metadata(
    family="sd15",
    rank=4,
    alpha=2.0,
    name="test",
    steps=10,
    resolution=512,
    prediction="epsilon",
)
Modules = dict[str, tuple[int, ...]]
Pairs = dict[str, LoRAPair]


UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (16, 32, 32, 32)},
    "sd21": {"block_out_channels": (16, 32, 32, 32), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    },
}


every_family = pytest.mark.parametrize("family", UNETS, scope="module", indirect=True)


@pytest.fixture(scope="module", params=["sd15"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def unet(family: str) -> UNet2DConditionModel:
    """diffusers' U-Net of a family's topology, small and random."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        **UNETS[family],
    ).eval()


@pytest.fixture(scope="module")
def modules(unet: UNet2DConditionModel) -> Modules:
    """Weight shape of every linear layer and convolution, by our name."""
    return {
        from_diffusers(name): tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def random_pair(shape: tuple[int, ...], rank: int, alpha: float) -> LoRAPair:
    down = torch.randn(rank, *shape[1:])
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
    return LoRAPair(down=down * down[0].numel() ** -0.5, up=up / rank, alpha=alpha)


@pytest.fixture(scope="module")
def pairs(modules: Modules) -> Pairs:
    """One alpha that is not the rank, on every module that LoRA can go on, 3×3 kernels too."""
    torch.manual_seed(1)
    return {name: random_pair(shape, 4, 2.0) for name, shape in modules.items()}


@pytest.fixture(scope="module")
def mixed(modules: Modules) -> Pairs:
    """Ranks and alphas that differ, most of all within attention."""
    torch.manual_seed(2)
    settings = [(4, 4.0), (8, 2.0), (2, 1.0), (4, 4.0), (3, 6.0)]
    return {
        name: random_pair(shape, *settings[index % 5])
        for index, (name, shape) in enumerate(modules.items())
    }


@torch.no_grad()
def computed(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 24, generator=generator)
    added = {
        "text_embeds": torch.randn(2, 12, generator=generator),
        "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(2, -1),
    }
    return unet(latents, torch.tensor([10, 700]), context, added_cond_kwargs=added).sample


@torch.no_grad()
def by_hand(unet: UNet2DConditionModel, pairs: Mapping[str, LoRAPair]) -> Tensor:
    """What the U-Net computes with alpha / r · up · down added to its weights."""
    changed = copy.deepcopy(unet)
    for name, pair in pairs.items():
        weight = changed.get_submodule(to_diffusers(name)).weight
        delta = pair.up.flatten(1) @ pair.down.flatten(1) * pair.alpha / pair.rank
        weight += delta.reshape(weight.shape)
    return computed(changed)


def in_diffusers(unet: UNet2DConditionModel, path: Path) -> Tensor:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    parts: dict[str, Any] = {"unet": copy.deepcopy(unet), "scheduler": scheduler}
    if unet.config["addition_embed_type"]:
        nothing = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        pipeline = StableDiffusionXLPipeline(**parts, **dict.fromkeys(nothing))
    else:
        nothing = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipeline = StableDiffusionPipeline(
            **parts, **dict.fromkeys(nothing), requires_safety_checker=False
        )
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return computed(pipeline.unet)


def in_peft(unet: UNet2DConditionModel, path: Path) -> Tensor:
    return computed(PeftModel.from_pretrained(copy.deepcopy(unet), str(path)))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


CONSUMERS: list[tuple[Dialect, Callable[[UNet2DConditionModel, Path], Tensor]]] = [
    ("kohya", in_diffusers),
    ("diffusers", in_diffusers),
    ("peft", in_peft),
]


@every_family
@pytest.mark.parametrize("kind", ["pairs", "mixed"])
@pytest.mark.parametrize(("dialect", "consumer"), CONSUMERS, ids=[d for d, _ in CONSUMERS])
def test_other_programs_compute_the_same(
    tmp_path: Path,
    unet: UNet2DConditionModel,
    modules: Modules,
    request: pytest.FixtureRequest,
    dialect: Dialect,
    consumer: Callable[[UNet2DConditionModel, Path], Tensor],
    kind: str,
) -> None:
    pairs: Pairs = request.getfixturevalue(kind)
    path = tmp_path / ("folder" if dialect == "peft" else "adapter.safetensors")
    write_adapter(
        pairs, path, dialect=dialect, dtype=torch.float32, metadata=METADATA, modules=modules
    )
    expected = by_hand(unet, pairs)
    assert difference(consumer(unet, path), expected) < 1e-5
    assert difference(computed(unet), expected) > 0.1


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_both_of_kohyas_spellings_mean_the_same_to_diffusers(
    tmp_path: Path, unet: UNet2DConditionModel, modules: Modules, pairs: Pairs
) -> None:
    known = {n: p for n, p in pairs.items() if not n.startswith("add_embedding.")}  # in one of them
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    write_adapter(
        known, own, dialect="kohya", dtype=torch.float32, metadata=METADATA, modules=modules
    )
    write_adapter(known, other, dialect="kohya", dtype=torch.float32, metadata=METADATA)
    assert read_header(own).tensors.keys().isdisjoint(read_header(other).tensors)
    assert "lora_unet_input_blocks_4_1_proj_in.alpha" in read_header(own).tensors
    expected = by_hand(unet, known)
    for path in (own, other):
        assert difference(in_diffusers(unet, path), expected) < 1e-5
        assert difference(by_hand(unet, read_adapter(path, modules).pairs), expected) == 0


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_control_a_block_counted_wrong_is_seen(
    tmp_path: Path, unet: UNet2DConditionModel, modules: Modules, pairs: Pairs
) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(
        pairs, path, dialect="kohya", dtype=torch.float32, metadata=METADATA, modules=modules
    )
    one, other = "input_blocks_7_1", "input_blocks_8_1"
    swapped = {
        key.replace(one, "…").replace(other, one).replace("…", other): tensor
        for key, tensor in load_file(path).items()
    }
    save_file(swapped, path)
    assert difference(in_diffusers(unet, path), by_hand(unet, pairs)) > 1e-3


@every_family
def test_one_module_in_both_spellings_is_refused(tmp_path: Path, modules: Modules) -> None:
    tensors = {
        f"lora_unet_{place}_proj_in.lora_{part}.weight": torch.ones(shape)
        for place in ("input_blocks_4_1", "down_blocks_1_attentions_0")
        for part, shape in (("down", (1, 32)), ("up", (32, 1)))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="2 pairs that are not whole") as refused:
        read_adapter(tmp_path / "a.safetensors", modules)
    assert all("the same as" in problem for problem in refused.value.problems)


@pytest.mark.parametrize(("dialect", "consumer"), CONSUMERS, ids=[d for d, _ in CONSUMERS])
def test_control_a_wrong_alpha_is_seen(
    tmp_path: Path,
    unet: UNet2DConditionModel,
    pairs: Pairs,
    dialect: Dialect,
    consumer: Callable[[UNet2DConditionModel, Path], Tensor],
) -> None:
    wrong = {n: LoRAPair(down=p.down, up=p.up, alpha=p.alpha * 1.01) for n, p in pairs.items()}
    path = tmp_path / ("folder" if dialect == "peft" else "adapter.safetensors")
    write_adapter(wrong, path, dialect=dialect, dtype=torch.float32, metadata=METADATA)
    assert difference(consumer(unet, path), by_hand(unet, pairs)) > 1e-4


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_round_trip(
    tmp_path: Path, modules: Modules, mixed: Pairs, pairs: Pairs, dialect: Dialect
) -> None:
    for given in (mixed, pairs):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        write_adapter(given, path, dialect=dialect, dtype=torch.float32, metadata=METADATA)
        found = read_adapter(path, modules)
        assert found.dialect == dialect
        assert found.metadata.items() >= METADATA.items()
        assert found.pairs.keys() == given.keys()
        for name, pair in given.items():
            back = found.pairs[name]
            assert torch.equal(back.down, pair.down)
            scaled, expected = back.up * back.alpha / back.rank, pair.up * pair.alpha / pair.rank
            torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_same_pairs_same_bytes(tmp_path: Path, mixed: Pairs, dialect: Dialect) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_adapter(mixed, one, dialect=dialect, metadata=METADATA)
    backwards = dict(reversed(METADATA.items()))
    write_adapter(dict(reversed(mixed.items())), other, dialect=dialect, metadata=backwards)
    assert one.read_bytes() == other.read_bytes()


def test_kohya_hash_is_of_the_data(tmp_path: Path, pairs: Pairs) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(pairs, path, dialect="kohya", metadata=METADATA)
    header = read_header(path)
    digest = hashlib.sha256(path.read_bytes()[header.data_start :]).hexdigest()
    assert header.metadata["sshs_model_hash"] == digest
    assert header.metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert {header.tensors[key].dtype for key in header.tensors if not key.endswith("alpha")} == {
        "F16"
    }


def test_numbers_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    pair = LoRAPair(down=torch.full((2, 3), 70000.0), up=torch.ones(5, 2), alpha=2.0)
    path = tmp_path / "a.safetensors"
    with pytest.raises(NonFiniteError, match="1 of 2 tensors cannot be written as float16"):
        write_adapter({"conv_in": pair}, path, dialect="kohya", metadata={})
    assert not path.exists()
    write_adapter({"conv_in": pair}, path, dialect="kohya", dtype=torch.bfloat16, metadata={})


def test_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a single pair"):
        write_adapter({}, tmp_path / "a", dialect="kohya", metadata={})


def test_a_folder_is_not_overwritten(tmp_path: Path, pairs: Pairs) -> None:
    write_adapter(pairs, tmp_path / "a", dialect="peft", metadata={})
    with pytest.raises(OccupiedError):
        write_adapter(pairs, tmp_path / "a", dialect="peft", metadata={})


def test_underflow_is_the_share_that_becomes_zero() -> None:
    pair = LoRAPair(down=torch.tensor([[1e-9, 1.0, 0.0]]), up=torch.ones(1, 1), alpha=1.0)
    assert underflow({"a": pair}, torch.float16) == 0.25
    assert underflow({"a": pair}, torch.bfloat16) == 0.0


# Files of other writers, and broken ones. LINEAR is a linear layer, CONV a 1×1 convolution.

LINEAR = "down.0.layers.0.attention.blocks.0.attn1.to_q"
CONV = "down.0.layers.0.attention.proj_in"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA_CONV = "lora_unet_down_blocks_0_attentions_0_proj_in"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def a_pair(*kernel: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, 16, *kernel), torch.randn(16, 2, *kernel)


DOWN, UP = a_pair()


@pytest.mark.parametrize(
    ("tensors", "alpha"),
    [
        ({f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}, 2.0),
        (
            {
                f"{KOHYA}.lora_down.weight": DOWN,
                f"{KOHYA}.lora_up.weight": UP,
                f"{KOHYA}.alpha": torch.tensor(3),
            },
            3.0,
        ),
        (
            {
                f"{KOHYA}.lora_down.weight": DOWN.half(),
                f"{KOHYA}.lora_up.weight": UP.half(),
                f"{KOHYA}.alpha": torch.tensor([0.5]).half(),
            },
            0.5,
        ),
        ({f"{DOTTED}.to_q.lora_A.weight": DOWN, f"{DOTTED}.to_q.lora_B.weight": UP}, 2.0),
        ({f"{DOTTED}.to_q.lora.down.weight": DOWN, f"{DOTTED}.to_q.lora.up.weight": UP}, 2.0),
        (
            {
                f"{DOTTED}.processor.to_q_lora.down.weight": DOWN,
                f"{DOTTED}.processor.to_q_lora.up.weight": UP,
            },
            2.0,
        ),
    ],
    ids=["no alpha", "integer alpha", "half", "diffusers", "older", "oldest"],
)
def test_spellings_of_one_pair(
    tmp_path: Path, modules: Modules, tensors: dict[str, Tensor], alpha: float
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    found = read_adapter(path, modules).pairs
    assert list(found) == [LINEAR]
    assert found[LINEAR].alpha == alpha
    assert torch.equal(found[LINEAR].down, next(iter(tensors.values())))


@pytest.mark.parametrize("spelling", ["to_q.lora_A", "to_q.lora.down", "processor.to_q_lora.down"])
def test_diffusers_agrees_on_its_spellings(
    tmp_path: Path, unet: UNet2DConditionModel, modules: Modules, spelling: str
) -> None:
    other = spelling.replace("lora_A", "lora_B").replace("down", "up")
    path = tmp_path / "a.safetensors"
    save_file({f"{DOTTED}.{spelling}.weight": DOWN, f"{DOTTED}.{other}.weight": UP}, path)
    expected = in_diffusers(unet, path)
    assert difference(by_hand(unet, read_adapter(path, modules).pairs), expected) < 1e-5
    assert difference(computed(unet), expected) > 1e-4


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_1x1_kernels_may_be_there_or_not(
    tmp_path: Path, modules: Modules, module: str, kernel: tuple[int, ...]
) -> None:
    name = {LINEAR: KOHYA, CONV: KOHYA_CONV}[module]
    down, up = a_pair(*kernel)
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    found = read_adapter(path, modules).pairs[module]
    shape = modules[module]
    assert found.down.shape == (2, *shape[1:])
    assert found.up.shape == (shape[0], 2, *shape[2:])


def whole() -> dict[str, Tensor]:
    """One good pair."""
    return {
        f"{KOHYA}.lora_down.weight": DOWN,
        f"{KOHYA}.lora_up.weight": UP,
        f"{KOHYA}.alpha": torch.tensor(2.0),
    }


def without(part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in whole().items() if key != f"{KOHYA}.{part}"}


def changed(part: str, tensor: Tensor) -> dict[str, Tensor]:
    return whole() | {f"{KOHYA}.{part}": tensor.contiguous()}


@pytest.mark.parametrize(
    ("tensors", "problem", "detail"),
    [
        (without("lora_up.weight"), "not whole", "its up matrix is missing"),
        (without("lora_down.weight"), "not whole", "its down matrix is missing"),
        (changed("lora_up.weight", UP[:, :1]), "do not fit", r"lora_up.weight: \[16, 1\]"),
        (changed("lora_down.weight", DOWN[:, :3]), "do not fit", r"down.weight: \[2, 3\]"),
        (changed("lora_down.weight", DOWN[..., None, None].repeat(1, 1, 3, 3)), "do not fit", ""),
        (changed("lora_down.weight", DOWN[:0]), "do not fit", r"\[0, 16\]"),
        (changed("lora_down.weight", torch.tensor(1.0)), "do not fit", r"\[\]"),
        (changed("alpha", torch.ones(2)), "do not fit", r"alpha: \[2\]"),
        (changed("lora_up.weight", UP.char()), "do not fit", "I8, not one of F64"),
        (changed("lora_up.weight", UP * torch.nan), "not finite", "NaN or infinite"),
        (changed("alpha", torch.tensor(torch.inf)), "not finite", "NaN or infinite"),
        (whole() | {"lora_unet_nothing.alpha": torch.ones(())}, "belong to no module", "nothing"),
        (whole() | {"foreign": torch.ones(1)}, "belong to no module", "foreign"),
        (
            {
                f"{DOTTED}.to_q.lora_A.weight": DOWN,
                f"{DOTTED}.to_q.lora_B.weight": UP,
                f"{DOTTED}.to_q.lora.up.weight": UP.clone(),
            },
            "not whole",
            "the same as",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, modules: Modules, tensors: dict[str, Tensor], problem: str, detail: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"the adapter has . .*{problem}") as refused:
        read_adapter(path, modules)
    assert any(re.search(detail, line) for line in refused.value.problems)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "text encoder"),
        (f"{KOHYA}.dora_scale", "DoRA"),
        (f"{KOHYA}.hada_w1_a", "LoHa"),
        (f"{KOHYA}.lokr_w1", "LoKr"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_norm1.alpha", "another family"),
    ],
)
def test_the_hint_says_what_foreign_keys_are(
    tmp_path: Path, modules: Modules, key: str, hint: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(whole() | {key: torch.ones(1)}, path)
    with pytest.raises(ModelError, match="1 keys that belong to no module") as refused:
        read_adapter(path, modules)
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("change", "fit"),
    [
        ({"lora_unet_nothing.alpha": torch.ones(())}, "2 of its 3"),
        ({"lora_unet_nothing.alpha": torch.ones(()), "foreign": torch.ones(1)}, "2 of its 4"),
        ({f"{KOHYA}.dora_scale": torch.ones(1)}, "1 of its 2"),
        ({f"{KOHYA}.dora_scale": torch.ones(1), f"{KOHYA}.hada_w1_a": torch.ones(1)}, "1 of its 2"),
        ({f"{KOHYA}.lora_up.weight": None}, "1 of its 2"),
        ({f"{KOHYA}.lora_up.weight": UP[:, :1].contiguous()}, "1 of its 2"),
        ({f"{KOHYA}.lora_up.weight": UP * torch.nan}, "1 of its 2"),
        ({key.replace("_q", "_z"): value for key, value in whole().items()}, "2 of its 3"),
    ],
)
def test_what_fits_is_counted(
    tmp_path: Path, modules: Modules, change: dict[str, Tensor | None], fit: str
) -> None:
    other = {key.replace("to_q", "to_out_0"): tensor for key, tensor in whole().items()}
    kept = {k: t.clone() for k, t in (whole() | other | change).items() if t is not None}
    save_file(kept, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"; {fit} modules fit"):
        read_adapter(tmp_path / "a.safetensors", modules)


def test_many_problems_are_counted_and_five_shown(tmp_path: Path, modules: Modules) -> None:
    path = tmp_path / "a.safetensors"
    save_file(whole() | {f"\x1b{i}": torch.ones(1) for i in range(9)}, path)
    with pytest.raises(ModelError, match="9 keys") as refused:
        read_adapter(path, modules)
    assert refused.value.problems == (*(rf"\x1b{i}" for i in range(5)), "and 4 more")


@pytest.mark.parametrize("name", ["conv_in.weight", "model.diffusion_model.out.2.bias", ""])
def test_a_base_model_is_no_adapter(tmp_path: Path, modules: Modules, name: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(1)} if name else {}, path)
    with pytest.raises(ModelError, match="no adapter"):
        read_adapter(path, modules)


def diffusers_file(path: Path, config: Any) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    tensors = {f"{DOTTED}.to_q.lora_A.weight": DOWN, f"{DOTTED}.to_q.lora_B.weight": UP}
    save_file(tensors, path, metadata={"lora_adapter_metadata": text})
    return path


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"unet.lora_alpha": 8}, 8.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 * 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 1.0),
        ({"text_encoder.lora_alpha": 8}, 2.0),
    ],
)
def test_diffusers_keeps_its_scale_in_the_header(
    tmp_path: Path, modules: Modules, config: dict[str, Any], alpha: float
) -> None:
    path = diffusers_file(tmp_path / "a.safetensors", config)
    assert read_adapter(path, modules).pairs[LINEAR].alpha == pytest.approx(alpha)


@pytest.mark.parametrize("config", ["{", {"unet.lora_alpha": "8"}, {"unet.peft_type": "LOKR"}])
def test_a_broken_scale_is_refused(tmp_path: Path, modules: Modules, config: Any) -> None:
    with pytest.raises(ModelError):
        read_adapter(diffusers_file(tmp_path / "a.safetensors", config), modules)


def test_peft_without_its_config_has_no_scale(
    tmp_path: Path, modules: Modules, pairs: Pairs
) -> None:
    folder = tmp_path / "a"
    write_adapter(pairs, folder, dialect="peft", metadata={})
    assert read_adapter(folder / "adapter_model.safetensors", modules).dialect == "peft"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        read_adapter(folder, modules)
    with pytest.raises(ModelError, match="no such file"):
        read_adapter(tmp_path, modules)


def test_no_file_is_loaded_before_its_keys_fit(
    tmp_path: Path, modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(whole() | {"foreign": torch.ones(1)}, path)
    monkeypatch.setattr("eri.formats.adapter_file.load_tensors", pytest.fail)
    with pytest.raises(ModelError, match="belong to no module"):
        read_adapter(path, modules)
