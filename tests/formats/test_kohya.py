"""kohya's names and alphas; whether other programs agree is tested in test_adapter_file.py.

A digest below is the SHA-256 of the sorted lines `<diffusers name> <name in kohya's file>\n` of
every linear layer and convolution of a real U-Net, from lists that were compared with the modules
of kohya's own network class.
"""

import re
from hashlib import sha256

import pytest
import torch

from eri.formats.kohya import alphas, keys, weights
from eri.formats.lora_pair import LoRAPair
from eri.formats.unet_names import to_diffusers
from eri.models.spec import SD15, SD21, SDXL
from eri.models.unet import UNetSpec
from eri.run.adapter_files import shapes_of

TO_OUT = "down.0.layers.1.attention.blocks.0.attn1.to_out"
ONLY_IN_SDXL = re.compile(r"down\.\d\.layers\.1\..+|up\.\d\.layers\.2\..+")
THEIRS = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"


def pair(rank: int, alpha: float) -> LoRAPair:
    return LoRAPair(down=torch.ones(rank, 3), up=torch.ones(5, rank), alpha=alpha)


LIKE_DIFFUSERS = {
    SD15: "50569d500995bbd627694f99a38fa3447b61905bc2e8dc2c74ed44fbd0898bc6",
    SD21: "50569d500995bbd627694f99a38fa3447b61905bc2e8dc2c74ed44fbd0898bc6",
    SDXL: "0c11cb28ed5b8a53addb61ac4652fba580b692fc5a0199cbde8ba4f5b8f0dc56",
}
LIKE_COMPVIS = {
    SD15: "b339f056067c8c3fcbf2d044229be6cd4318259596e5d6a1e2e7ee71a2494965",
    SD21: "b339f056067c8c3fcbf2d044229be6cd4318259596e5d6a1e2e7ee71a2494965",
    SDXL: "f7934e8b8fff1d8c08dda3dfee8663ca22a899922a833af0ba4c6e9569e17b19",
}
OWN = LIKE_DIFFUSERS | {SDXL: LIKE_COMPVIS[SDXL]}
each_spec = pytest.mark.parametrize("spec", OWN, ids=lambda spec: spec.family)


def digest(names: dict[str, str]) -> str:
    lines = sorted(f"{to_diffusers(module)} {name}\n" for module, name in names.items())
    return sha256("".join(lines).encode()).hexdigest()


def written(spec: UNetSpec, modules: list[str] | None) -> dict[str, str]:
    """The name that each module of a net gets in a file of ours."""
    pairs = dict.fromkeys(shapes_of(spec), pair(1, 1.0))
    found = [key for key in weights(pairs, modules) if key.endswith(".lora_down.weight")]
    assert [key.partition(".")[0] for key in alphas(pairs, modules)] == [
        key.partition(".")[0] for key in found
    ]
    return dict(zip(pairs, (key.partition(".")[0] for key in found), strict=True))


@each_spec
def test_names_are_those_of_kohyas_own_network(spec: UNetSpec) -> None:
    modules = list(shapes_of(spec))
    assert digest(written(spec, modules)) == OWN[spec]
    some = {"mid.layers.0.attention.proj_in": pair(1, 1.0)}  # what is adapted does not matter
    name = written(spec, modules)["mid.layers.0.attention.proj_in"]
    assert list(weights(some, modules)) == [f"{name}.lora_down.weight", f"{name}.lora_up.weight"]


@each_spec
def test_a_net_that_is_not_known_gets_the_names_of_diffusers(spec: UNetSpec) -> None:
    assert digest(written(spec, None)) == LIKE_DIFFUSERS[spec]


@each_spec
def test_both_spellings_are_read_for_every_family(spec: UNetSpec) -> None:
    modules = list(shapes_of(spec))
    table = keys(modules)
    down = [(m, key.partition(".")[0]) for key, (m, part) in table.items() if part == "down"]
    assert len(table) == 2 * 3 * len(modules)  # no two modules share a key
    assert digest(dict(down[: len(modules)])) == LIKE_DIFFUSERS[spec]
    assert digest(dict(down[len(modules) :])) == LIKE_COMPVIS[spec]


def test_the_parts_of_a_module() -> None:
    found = {key: value for key, value in keys(shapes_of(SD15)).items() if value[0] == TO_OUT}
    compvis = "lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_out_0"
    assert found == {
        f"{name}.{ending}": (TO_OUT, part)
        for name in (THEIRS, compvis)
        for ending, part in (
            ("lora_down.weight", "down"),
            ("lora_up.weight", "up"),
            ("alpha", "alpha"),
        )
    }


def test_where_blocks_would_be_counted_otherwise_their_numbers_are_not_used() -> None:
    """input_blocks.5 is the third level of such a net, and the second one of SDXL."""
    modules = [name for name in shapes_of(SDXL) if not ONLY_IN_SDXL.fullmatch(name)]
    assert len(keys(modules)) == 3 * len(modules)
    name = "down.2.layers.0.attention.proj_in"
    (down, _) = weights({name: pair(1, 1.0)}, modules)
    assert down == "lora_unet_down_blocks_2_attentions_0_proj_in.lora_down.weight"


def test_one_alpha_is_written_beside_the_matrices() -> None:
    pairs = {TO_OUT: pair(2, 8.0), "conv_in": pair(4, 8.0)}
    assert weights(pairs)[f"{THEIRS}.lora_up.weight"].tolist() == torch.ones(5, 2).tolist()
    found = alphas(pairs)
    assert found[f"{THEIRS}.alpha"].shape == ()
    assert {float(value) for value in found.values()} == {8.0}


def test_several_alphas_are_folded_into_up() -> None:
    pairs = {TO_OUT: pair(2, 8.0), "conv_in": pair(4, 2.0)}
    assert alphas(pairs) == {}
    found = weights(pairs)
    assert found[f"{THEIRS}.lora_up.weight"].unique().tolist() == [4.0]
    assert found["lora_unet_conv_in.lora_up.weight"].unique().tolist() == [0.5]
