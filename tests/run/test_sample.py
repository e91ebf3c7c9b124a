from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eri.adapters import attach, layer_shapes
from eri.config import ModelSource
from eri.errors import ConfigError, OccupiedError
from eri.formats.adapter_file import write_adapter
from eri.layers.backend import current_backend, set_backend
from eri.models import load_unet
from eri.run.sample import Drawing, draw
from tests.families import single_file
from tests.pairs import random_pair


@pytest.fixture
def drawing(shallow: Path) -> Drawing:
    return Drawing(
        model=ModelSource(path=str(shallow)),
        adapter=None,
        strength=1.0,
        prompts=("a red disc",),
        negative="",
        sampler="euler",
        steps=2,
        guidance=2.0,
        seed=0,
        size=None,
    )


def drawn(drawing: Drawing, path: Path) -> bytes:
    draw(drawing, path, overwrite=True)
    with Image.open(path) as picture:
        return picture.tobytes()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_one_prompt_is_one_picture_of_the_models_size(drawing: Drawing, tmp_path: Path) -> None:
    path = tmp_path / "out" / "disc.png"
    set_backend("cuda")  # as if a run had just ended here
    said = draw(drawing, path)
    assert current_backend() == "reference"  # a compiler that fails keeps no picture away
    assert "1 picture of 64x64\nprediction epsilon: its scheduler_config.json" in said
    assert size_of(path) == (64, 64)


def test_sdxl_draws_what_it_is_asked_for(drawing: Drawing, sdxl: Path, tmp_path: Path) -> None:
    drawing = replace(drawing, model=ModelSource(path=str(sdxl)))
    plain = drawn(drawing, tmp_path / "plain.png")
    assert plain == drawn(drawing, tmp_path / "again.png")
    assert plain != drawn(replace(drawing, prompts=("a blue star",)), tmp_path / "prompt.png")
    assert plain != drawn(replace(drawing, negative="a blue star"), tmp_path / "negative.png")


def test_prompts_are_read_as_the_uis_read_them(drawing: Drawing, tmp_path: Path) -> None:
    def with_(prompt: str, negative: str = "red") -> bytes:
        return drawn(replace(drawing, prompts=(prompt,), negative=negative), tmp_path / "it.png")

    plain = with_("a red disc")
    assert with_("a (red:1.0) disc") == plain
    assert with_("a (red:1.9) disc") != plain
    assert with_("a red disc", "(red:1.9)") != plain


def test_a_picture_does_not_hang_on_the_length_of_the_other_prompts(
    drawing: Drawing, tmp_path: Path
) -> None:
    def first(*prompts: str) -> Image.Image:
        path = tmp_path / f"{len(prompts)}.png"
        draw(replace(drawing, prompts=(*prompts, "a")), path)
        with Image.open(path) as sheet:
            return sheet.convert("RGB").crop((0, 0, 200, 200))

    assert first("red").tobytes() == first("red", "a " * 100).tobytes()


def test_several_prompts_come_on_one_sheet(drawing: Drawing, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    draw(replace(drawing, prompts=("a", "b")), path)
    assert size_of(path)[0] > 512


def test_a_run_brings_its_model_and_its_adapter(
    drawing: Drawing, finished: Path, sd15: Path, tmp_path: Path
) -> None:
    drawing = replace(drawing, model=ModelSource(path=str(sd15)))
    plain = drawn(drawing, tmp_path / "plain.png")
    of_run = drawn(replace(drawing, model=ModelSource(path=str(finished))), tmp_path / "run.png")
    by_file = replace(drawing, adapter=finished / "disc.safetensors")
    assert of_run == drawn(by_file, tmp_path / "file.png")
    assert of_run != plain
    assert drawn(replace(by_file, strength=0.0), tmp_path / "zero.png") == plain
    assert of_run == drawn(replace(drawing, adapter=finished), tmp_path / "of_run.png")


def test_an_adapter_on_every_layer_is_drawn(
    drawing: Drawing, shallow: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pairs = {
        name: random_pair(shape, rank=1, alpha=0.1)
        for name, shape in layer_shapes(load_unet(shallow)).items()
    }
    assert {"conv_in", "conv_out"} < pairs.keys()
    path = tmp_path / "every.safetensors"
    write_adapter(pairs, path, dialect="kohya", metadata={})
    adapted = drawn(replace(drawing, adapter=path), tmp_path / "adapted.png")
    assert adapted != drawn(drawing, tmp_path / "plain.png")


@pytest.mark.parametrize("change", [{"seed": 1}, {"guidance": 7.0}, {"steps": 3}])
def test_every_setting_counts(drawing: Drawing, tmp_path: Path, change: dict) -> None:
    path = tmp_path / "disc.png"
    assert drawn(drawing, path) == drawn(drawing, path)
    assert drawn(replace(drawing, **change), path) != drawn(drawing, path)


def test_a_size_that_the_model_cannot_draw_is_refused(drawing: Drawing, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--size 96 is not a multiple of 64"):
        draw(replace(drawing, size=96), tmp_path / "disc.png")


def test_a_picture_of_another_kind_than_png_is_refused(drawing: Drawing, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"written as PNG, not as \.jpg"):
        draw(drawing, tmp_path / "disc.jpg")


def test_an_existing_picture_is_kept(drawing: Drawing, tmp_path: Path) -> None:
    path = tmp_path / "disc.png"
    path.write_text("precious")
    with pytest.raises(OccupiedError):
        draw(drawing, path)
    assert path.read_text() == "precious"


def test_a_v_model_is_drawn_as_one(drawing: Drawing, sd21: Path, tmp_path: Path) -> None:
    """Its folder says v; a single file says nothing, so it is set, or its adapter tells."""
    drawing = replace(drawing, size=64)  # of SD2's published size a single file would be taken
    folder = replace(drawing, model=ModelSource(path=str(sd21)))
    assert "prediction v: its scheduler_config.json" in draw(folder, tmp_path / "folder.png")
    path = single_file(sd21, tmp_path / "model.safetensors")
    told = replace(drawing, model=ModelSource(path=str(path), prediction="v"))
    untold = replace(drawing, model=ModelSource(path=str(path)))
    said = draw(untold, tmp_path / "untold.png")
    assert "prediction not told by the files; taken for epsilon, --prediction sets it" in said
    said = draw(told, tmp_path / "half told.png")
    assert "SNR: not told by the files; taken for none, --zero-terminal-snr sets it" in said
    assert drawn(told, tmp_path / "told.png") != drawn(untold, tmp_path / "untold.png")

    adapter = tmp_path / "adapter.safetensors"
    unet = load_unet(path)
    pairs = attach(unet, rank=1).pairs()
    write_adapter(pairs, adapter, dialect="kohya", metadata={"modelspec.prediction_type": "v"})
    adapted = replace(untold, adapter=adapter)
    assert "prediction v: the file's modelspec.prediction_type" in draw(
        adapted, tmp_path / "adapted.png"
    )
    assert drawn(adapted, tmp_path / "again.png") == drawn(told, tmp_path / "told.png")
