import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from eri.config import DataSource
from eri.data import cache
from eri.data.cache import Latents, cache_latents
from eri.data.folder import Item, scan
from eri.data.shapes import Shape
from eri.errors import DataError, DiskError, NonFiniteError

SHAPE = Shape(64, 64)


class Encoder:
    """Stands for a VAE: pools the image, and counts what it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        assert images.dtype == torch.float32
        assert images.shape[:2] == (1, 3)
        assert -1.0 <= images.min() <= images.max() <= 1.0
        mean = torch.nn.functional.avg_pool2d(images, 8)
        return mean, mean.abs() + 0.5


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Item, ...]:
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for n in range(3):
        Image.new("RGB", (100, 80), (n * 100, 50, 0)).save(data / f"{n}.png")
        (data / f"{n}.txt").write_text("x")
    return scan([DataSource(path=data)]).items


def run(
    items: tuple[Item, ...], encode: Any, shape: Shape = SHAPE, encoder: str = "vae"
) -> Latents:
    return cache_latents(items, [shape] * len(items), encode, encoder=encoder)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.latent"))


def test_latents_are_those_of_the_encoder(items: tuple[Item, ...]) -> None:
    latents = run(items, Encoder())
    assert len(latents) == 3
    colour = torch.tensor([100, 50, 0]) / 127.5 - 1
    mean, std = latents[1]
    assert mean.shape == std.shape == (3, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.allclose(mean, colour.view(3, 1, 1).expand(3, 8, 8), atol=1e-6)
    assert torch.equal(std, mean.abs() + 0.5)


def test_a_second_run_encodes_nothing(items: tuple[Item, ...]) -> None:
    first = run(items, Encoder())
    encode = Encoder()
    second = run(items, encode)
    assert encode.calls == 0
    for n in range(3):
        assert torch.equal(first[n].mean, second[n].mean)
        assert torch.equal(first[n].std, second[n].std)


def test_a_touched_image_is_not_encoded_again(items: tuple[Item, ...]) -> None:
    run(items, Encoder())
    os.utime(items[0].path, (1, 1))
    encode = Encoder()
    run(scan([DataSource(path=items[0].path.parent)]).items, encode)
    assert encode.calls == 0


def test_an_edited_image_is_encoded_again(items: tuple[Item, ...]) -> None:
    before = items[0].path.stat()
    run(items, Encoder())
    Image.new("RGB", (100, 80), (1, 2, 3)).save(items[0].path)
    os.utime(items[0].path, (before.st_atime, before.st_mtime))
    encode = Encoder()
    latents = run(scan([DataSource(path=items[0].path.parent)]).items, encode)
    assert encode.calls == 1
    assert latents[0].mean[0, 0, 0].item() == pytest.approx(1 / 127.5 - 1)


@pytest.mark.parametrize("change", [{"shape": Shape(128, 64)}, {"encoder": "another vae"}])
def test_what_the_latent_depends_on_is_in_its_name(
    items: tuple[Item, ...], change: dict[str, Any]
) -> None:
    run(items, Encoder())
    encode = Encoder()
    run(items, encode, **change)
    assert encode.calls == 3


def test_another_preprocessing_is_another_name(
    items: tuple[Item, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(items, Encoder())
    monkeypatch.setattr(cache, "PREPROCESSING", cache.PREPROCESSING + 1)
    encode = Encoder()
    run(items, encode)
    assert encode.calls == 3


def test_equal_images_are_encoded_once(items: tuple[Item, ...]) -> None:
    encode = Encoder()
    latents = run((items[0], items[0], items[0]), encode)
    assert encode.calls == 1
    assert torch.equal(latents[0].mean, latents[2].mean)


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: content[:-64] + bytes(64),
        flipped,
    ],
)
def test_a_damaged_entry_is_computed_again(tmp_path: Path, items: tuple[Item, ...], damage) -> None:
    expected = run(items, Encoder())[0].mean
    for path in entries(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    encode = Encoder()
    assert torch.equal(run(items, encode)[0].mean, expected)
    assert encode.calls == 3


def test_an_entry_that_vanishes_in_use_is_named(tmp_path: Path, items: tuple[Item, ...]) -> None:
    latents = run(items, Encoder())
    for path in entries(tmp_path):
        path.unlink()
    with pytest.raises(DataError, match=r"\.latent") as caught:
        latents[1]
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_a_latent_that_is_not_finite_is_named_and_never_kept(
    tmp_path: Path, items: tuple[Item, ...], value: float, part: int
) -> None:
    encoder = Encoder()

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        latent = encoder(images)
        if encoder.calls == 2:
            latent[part][0, 2, 3, 4] = value
        return latent

    with pytest.raises(NonFiniteError, match=r"1\.png"):
        run(items, encode)
    assert len(entries(tmp_path)) == 1
    run(items, Encoder())
    assert len(entries(tmp_path)) == 3


def test_an_image_that_changed_since_the_check_is_refused(items: tuple[Item, ...]) -> None:
    stale = (replace(items[0], sha256="0" * 64),)
    with pytest.raises(DataError, match="changed"):
        run(stale, Encoder())


def test_views_of_one_tensor_are_kept_apart(items: tuple[Item, ...]) -> None:
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([images, images + 1], dim=1).requires_grad_()
        mean, std = both.chunk(2, dim=1)
        return mean, std

    mean, std = run(items, encode)[0]
    assert torch.equal(mean + 1, std)
    assert not mean.requires_grad


def test_low_precision_and_other_layouts_come_back_as_float32(items: tuple[Item, ...]) -> None:
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images[:, :, ::8, ::8].to(torch.bfloat16)
        return mean, mean.to(memory_format=torch.channels_last)

    mean, std = run(items, encode)[0]
    assert mean.dtype == std.dtype == torch.float32


def test_the_cache_is_private_and_holds_nothing_else(
    tmp_path: Path, items: tuple[Item, ...]
) -> None:
    run(items, Encoder())
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(files) == entries(tmp_path)


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    tmp_path: Path, items: tuple[Item, ...]
) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "latents").write_bytes(b"")
    with pytest.raises(DiskError):
        run(items, Encoder())


def test_progress_counts_what_is_found_and_what_is_made(items: tuple[Item, ...]) -> None:
    seen: list[tuple[int, int]] = []
    run(items[:1], Encoder())
    cache_latents(
        items, [SHAPE] * 3, Encoder(), encoder="vae", progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


FILL = """
import sys
from pathlib import Path
import torch
from eri.config import DataSource
from eri.data.shapes import Shape
from eri.data.cache import cache_latents
from eri.data.folder import scan
torch.set_num_threads(1)
items = scan([DataSource(path=Path(sys.argv[1]))]).items
print("ready", flush=True)
for size in range(1, 200):
    shapes = [Shape(64 * size, 64)] * len(items)
    cache_latents(items, shapes, lambda images: (images, images), encoder="vae")
"""


def test_after_a_kill_every_entry_is_whole(tmp_path: Path, items: tuple[Item, ...]) -> None:
    command = [sys.executable, "-c", FILL, str(items[0].path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGKILL)
    found = entries(tmp_path)
    assert found
    latents = Latents(found)
    assert all(torch.equal(latents[n].mean, latents[n].std) for n in range(len(latents)))
