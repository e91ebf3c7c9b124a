"""Shapes alone tell what the config beside the weights says."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eri.errors import ModelError
from eri.formats.checkpoint import unet_part
from eri.formats.unet_config import UNetConfigFields
from eri.formats.unet_shapes import Shapes, fields_from_shapes, refuse_unusable
from eri.models.spec import build_spec
from tests.families import save_sdxl
from tests.odd_files import REFINER, SSD_1B

HERE = Path("model.safetensors")
READ = ["conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight"]  # among others


@pytest.fixture(params=["sd15_real", "sd21", "sdxl"])
def family(request: pytest.FixtureRequest) -> tuple[Shapes, UNetConfigFields]:
    """The shapes of a small model, by our names, and what its config says."""
    return known(request.getfixturevalue(request.param))


def known(folder: Path) -> tuple[Shapes, UNetConfigFields]:
    part = unet_part(folder)
    return {name: piece.shape for name, piece in part.pieces.items()}, part.fields


def told(shapes: Shapes, *, openclip: bool = False) -> UNetConfigFields:
    return fields_from_shapes(shapes, HERE, openclip=openclip)


def test_what_the_config_says_is_told_by_shapes(family: tuple[Shapes, UNetConfigFields]) -> None:
    shapes, fields = family
    found = told(shapes)
    assert replace(found, sample_size=8) == fields
    assert found.sample_size == {"sd15": 64, "sd21": 96, "sdxl": 128}[build_spec(fields).family]


def test_shallower_and_wider_nets(tmp_path: Path) -> None:
    shapes, fields = known(save_sdxl(tmp_path / "ssd", **SSD_1B))
    assert replace(told(shapes), sample_size=8) == fields
    assert told(shapes).mid_depth is None
    shapes, fields = known(save_sdxl(tmp_path / "in", in_channels=9, layers_per_block=1))
    assert told(shapes).in_channels == 9
    assert replace(told(shapes), sample_size=8) == fields


def with_convolutions(shapes: Shapes) -> Shapes:
    """The transformers entered and left by a convolution."""
    return {
        name: (*shape[:2], 1, 1) if name.endswith(("ion.proj_in.weight", "ion.proj_out.weight"))
        else shape
        for name, shape in shapes.items()
    }  # fmt: skip


def test_sd2_with_convolutions_is_told_by_its_text_encoder_or_width(sd21: Path) -> None:
    shapes, fields = known(sd21)
    as_conv = with_convolutions(shapes)
    assert replace(told(as_conv, openclip=True), sample_size=8) == fields
    assert not told(as_conv).linear_projection
    wide = {name: (*s[:-1], 1024) if "attn2.to_" in name else s for name, s in as_conv.items()}
    assert told(wide).linear_projection


def test_sdxl_with_convolutions_is_told_by_its_added_conditions(sdxl: Path) -> None:
    shapes, fields = known(sdxl)
    assert replace(told(with_convolutions(shapes)), sample_size=8) == fields


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: replace(f, down_depths=((1, 1), *f.down_depths[1:])), "SD2 unCLIP"),
        (lambda f: replace(f, pooled_dim=0), "does not know"),
    ],
    ids=["attention everywhere", "no pooled text"],
)
def test_nets_of_another_purpose_are_named(
    sdxl: Path, change: Callable[[UNetConfigFields], UNetConfigFields], what: str
) -> None:
    _, fields = known(sdxl)
    refuse_unusable(fields, HERE)
    with pytest.raises(ModelError, match=what):
        refuse_unusable(change(fields), HERE)


def test_the_refiner_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the SDXL refiner"):
        unet_part(save_sdxl(tmp_path, **REFINER))


@pytest.mark.parametrize(
    "missing", ["conv_in.weight", "down.1.", "up.0.layers.1.resnet", "down.0.layers.0.resnet"]
)
def test_a_net_that_is_not_whole_is_refused(sd15_real: Path, missing: str) -> None:
    shapes, _ = known(sd15_real)
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(missing)}
    with pytest.raises(ModelError, match="not whole"):
        told(rest)
    with pytest.raises(ModelError, match="not whole"):
        told({})


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("down.3.layers.0.resnet.conv1.weight", (48, 64, 3, 3), "width 48 cannot have 32 groups"),
        ("conv_in.weight", (32, 0, 3, 3), r"conv_in\.weight is \[32, 0, 3, 3\]"),
        ("conv_out.weight", (4,), r"conv_out\.weight is \[4\]"),
    ],
)
def test_sizes_that_no_net_has_are_refused(
    sd15_real: Path, name: str, shape: tuple[int, ...], what: str
) -> None:
    shapes, _ = known(sd15_real)
    with pytest.raises(ModelError, match=what):
        told(dict(shapes) | {name: shape})


def test_any_shapes_make_a_spec_or_are_refused(family: tuple[Shapes, UNetConfigFields]) -> None:
    """Damaged headers never end in an error of ours."""
    shapes, _ = family
    draw = random.Random(0)
    outcomes = set()
    for _ in range(300):
        odd: dict[str, Any] = dict(shapes)
        for name in [*draw.sample([*odd], 3), *draw.sample(READ, 1)]:
            sides = [draw.choice([0, 1, 3, 16, 48, 64, 1000]) for _ in range(draw.randrange(5))]
            odd[name] = tuple(sides)
            if draw.random() < 0.3:
                del odd[name]
        try:
            fields = told(odd)
            refuse_unusable(fields, HERE)
            build_spec(fields)
            outcomes.add("told")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"told", "refused"}
