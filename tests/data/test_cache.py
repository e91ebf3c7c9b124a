import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eri.data import cache
from eri.data.cache import Latents, cache_latents, latent_bytes, missing_latents
from eri.data.cuts import PLAIN, UNIT, Cut, View
from eri.data.items import Item, Mask
from eri.data.shapes import Shape
from eri.errors import DataError, DiskError, NonFiniteError
from tests.data.test_entries import DAMAGES, Damage

SHAPE = Shape(64, 64)


class Encoder:
    """Stands for a VAE: pools the image, and notes what it is asked for."""

    def __init__(self, *, tiled: bool = False) -> None:
        self.seen: list[Tensor] = []
        self.tiled = tiled

    @property
    def calls(self) -> int:
        return len(self.seen)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, bool]:
        assert images.dtype == torch.float32
        assert images.shape[:2] == (1, 3)
        assert -1.0 <= images.min() <= images.max() <= 1.0
        mean = torch.nn.functional.avg_pool2d(images, 8)
        self.seen.append(mean[0])
        return mean, mean.abs() + 0.5, self.tiled


def checked(path: Path, **fields: Any) -> Item:
    """An image as the check of a folder gives it."""
    with Image.open(path) as image:
        size = ImageOps.exif_transpose(image).size
    digest = sha256(path.read_bytes()).hexdigest()
    given = {"captions": ("x",), "source": 0, **fields}
    return Item(path=path, width=size[0], height=size[1], sha256=digest, **given)


@pytest.fixture
def items(tmp_path: Path) -> tuple[Item, ...]:
    for n in range(3):
        image = Image.linear_gradient("L").resize((100, 80)).convert("RGB")
        image.paste((n * 100, 50, 0), (0, 0, 30, 80))
        image.save(tmp_path / f"{n}.png")
    return tuple(checked(tmp_path / f"{n}.png") for n in range(3))


def run(items: Sequence[Item | Cut], encode: Any, encoder: str = "vae") -> Latents:
    cuts = [item if isinstance(item, Cut) else Cut(item, SHAPE) for item in items]
    return cache_latents(cuts, encode, encoder=encoder)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_latents_are_those_of_the_encoder(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80), (100, 50, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 80), (200, 50, 0)).save(tmp_path / "b.png")
    latents = run([checked(tmp_path / "a.png"), checked(tmp_path / "b.png")], Encoder())
    assert len(latents) == 2
    for latent, red in ((latents[0], 100), (latents[1], 200)):
        color = torch.tensor([red, 50, 0]) / 127.5 - 1
        assert latent.mean.shape == latent.std.shape == (3, 8, 8)
        assert latent.mean.dtype == latent.std.dtype == torch.float32
        assert torch.allclose(latent.mean, color.view(3, 1, 1).expand(3, 8, 8), atol=1e-6)
        assert torch.equal(latent.std, latent.mean.abs() + 0.5)
        assert latent.mask is None


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
    run([checked(item.path) for item in items], encode)
    assert encode.calls == 0


def test_an_edited_image_is_encoded_again_though_its_size_and_time_are_the_same(
    items: tuple[Item, ...],
) -> None:
    path = items[1].path.with_suffix(".bmp")
    Image.new("RGB", (100, 80), (9, 9, 9)).save(path)
    items = (items[0], checked(path), items[2])
    before = path.stat()
    run(items, Encoder())
    Image.new("RGB", (100, 80), (1, 2, 3)).save(path)
    os.utime(path, (before.st_atime, before.st_mtime))
    after = path.stat()
    assert (after.st_size, after.st_mtime) == (before.st_size, before.st_mtime)
    encode = Encoder()
    latents = run([checked(item.path) for item in items], encode)
    assert encode.calls == 1
    assert latents[1].mean[0, 0, 0].item() == pytest.approx(1 / 127.5 - 1)


CHANGES: dict[str, dict[str, Any]] = {
    "resolution": {"shape": Shape(32, 32)},
    "shape": {"shape": Shape(64, 32)},
    "flip": {"view": PLAIN._replace(flip=True)},
    "zoom": {"view": PLAIN._replace(zoom=100)},
    "crop": {"view": PLAIN._replace(across=0)},
    "brightness": {"view": PLAIN._replace(brightness=UNIT + 100)},
    "contrast": {"view": PLAIN._replace(contrast=UNIT + 100)},
    "saturation": {"view": PLAIN._replace(saturation=UNIT - 100)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_cut_is_encoded_and_nothing_else(
    items: tuple[Item, ...], change: dict[str, Any]
) -> None:
    cuts = [Cut(item, SHAPE) for item in items]
    before = run(cuts, Encoder())
    changed = [cuts[0], replace(cuts[1], **change), cuts[2]]
    encode = Encoder()
    after = run(changed, encode)
    assert encode.calls == 1
    assert torch.equal(after[1].mean, encode.seen[0])
    assert after[1].mean.shape != before[1].mean.shape or not torch.equal(
        after[1].mean, before[1].mean
    )
    assert torch.equal(after[0].mean, before[0].mean)
    run([*cuts, *changed], encode)
    assert encode.calls == 1


def test_another_background_changes_transparent_images_alone(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "opaque.png")
    opaque = checked(tmp_path / "opaque.png")
    run([opaque, checked(tmp_path / "clear.png", background="#ffffff")], Encoder())
    encode = Encoder()
    latents = run([opaque, checked(tmp_path / "clear.png", background="#008000")], encode)
    assert encode.calls == 1
    green = torch.tensor([0, 128, 0]) / 127.5 - 1
    assert torch.allclose(latents[1].mean[:, 3, 3], green, atol=1e-6)


def test_another_encoder_encodes_all_anew(items: tuple[Item, ...]) -> None:
    run(items, Encoder())
    encode = Encoder()
    run(items, encode, encoder="another vae")
    assert encode.calls == 3


def test_another_preprocessing_encodes_all_anew(
    items: tuple[Item, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(items, Encoder())
    monkeypatch.setattr(cache, "PREPROCESSING", cache.PREPROCESSING + 1)
    encode = Encoder()
    run(items, encode)
    assert encode.calls == 3


def test_captions_and_sources_change_nothing(items: tuple[Item, ...]) -> None:
    run(items, Encoder())
    encode = Encoder()
    run([replace(item, captions=("another", "two"), source=3) for item in items], encode)
    assert encode.calls == 0


def test_equal_images_are_encoded_once(items: tuple[Item, ...]) -> None:
    encode = Encoder()
    copy = items[0].path.with_name("copy.png")
    copy.write_bytes(items[0].path.read_bytes())
    latents = run((items[0], items[1], items[0], checked(copy)), encode)
    assert encode.calls == 2
    assert torch.equal(latents[0].mean, latents[2].mean)
    assert torch.equal(latents[0].mean, latents[3].mean)


def test_views_of_one_image_are_read_once_and_encoded_in_order(
    items: tuple[Item, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    hashed_as = cache.hashed_as

    def noted(path: Path, sha256: str) -> Any:
        read.append(path)
        return hashed_as(path, sha256)

    monkeypatch.setattr(cache, "hashed_as", noted)
    views = [View(across=place) for place in range(0, UNIT, 300)]
    cuts = [Cut(item, SHAPE, view) for item in items for view in views]
    encode = Encoder()
    latents = run(cuts, encode)
    assert read == [item.path for item in items]
    assert encode.calls == len(cuts) == 12
    for n, seen in enumerate(encode.seen):
        assert torch.equal(latents[n].mean, seen)
    alone = Encoder()
    run([cuts[7]], alone, encoder="alone")
    assert torch.equal(alone.seen[0], latents[7].mean)


def test_a_tiled_encoding_has_its_own_entry_and_stands_in_for_the_whole(
    items: tuple[Item, ...], isolated_cache: Path
) -> None:
    tiled = run(items[:1], Encoder(tiled=True))
    encode = Encoder()
    assert run(items[:1], encode).paths == tiled.paths
    assert encode.calls == 0
    kept = tiled.paths[0].read_bytes()
    tiled.paths[0].unlink()
    whole = run(items[:1], Encoder())
    assert whole.paths != tiled.paths
    tiled.paths[0].write_bytes(kept)
    assert run(items[:1], encode).paths == whole.paths
    assert encode.calls == 0
    assert len(entries(isolated_cache)) == 2


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_computed_again(items: tuple[Item, ...], damage: Damage) -> None:
    latents = run(items, Encoder())
    path, expected = latents.paths[1], latents[1].mean
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"\.latent"):
        latents[1]
    encode = Encoder()
    assert torch.equal(run(items, encode)[1].mean, expected)
    assert encode.calls == 1


def test_an_entry_that_vanishes_in_use_is_named(items: tuple[Item, ...]) -> None:
    latents = run(items, Encoder())
    latents.paths[1].unlink()
    with pytest.raises(DataError, match=r"\.latent") as caught:
        latents[1]
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_a_latent_that_is_not_finite_is_named_and_never_kept(
    isolated_cache: Path, items: tuple[Item, ...], value: float, part: int
) -> None:
    encoder = Encoder()

    def encode(images: Tensor) -> tuple[Tensor, Tensor, bool]:
        mean, std, tiled = encoder(images)
        if encoder.calls == 2:
            (mean, std)[part][0, 2, 3, 4] = value
        return mean, std, tiled

    with pytest.raises(NonFiniteError, match=r"1\.png"):
        run(items, encode)
    assert len(entries(isolated_cache)) == 1
    run(items, Encoder())
    assert len(entries(isolated_cache)) == 3


def test_an_image_that_changed_since_the_check_is_refused(
    isolated_cache: Path, items: tuple[Item, ...]
) -> None:
    Image.new("RGB", (300, 300), (1, 2, 3)).save(items[1].path)
    with pytest.raises(DataError, match=r"the file changed.*1\.png"):
        run(items, Encoder())
    assert len(entries(isolated_cache)) == 1


def test_low_precision_views_and_other_layouts_come_back_as_float32(
    items: tuple[Item, ...],
) -> None:
    def encode(images: Tensor) -> tuple[Tensor, Tensor, bool]:
        both = torch.cat([images, images + 1], dim=1).requires_grad_()
        mean, std = both.to(torch.bfloat16).to(memory_format=torch.channels_last).chunk(2, dim=1)
        return mean, std, False

    mean, std, _ = run(items, encode)[0]
    assert mean.dtype == std.dtype == torch.float32
    assert torch.allclose(mean + 1, std, atol=0.02)
    assert not mean.requires_grad


def test_a_latent_comes_with_its_mask(tmp_path: Path, items: tuple[Item, ...]) -> None:
    half = Image.new("L", (100, 80), 255)
    half.paste(0, (0, 0, 100, 40))
    half.save(tmp_path / "half.mask.png")
    digest = sha256((tmp_path / "half.mask.png").read_bytes()).hexdigest()
    masked = replace(
        items[1], mask=Mask(path=tmp_path / "half.mask.png", sha256=digest, alpha=False)
    )
    run(items, Encoder())
    encode = Encoder()
    latents = run([items[0], masked], encode)
    assert encode.calls == 0  # the mask is an entry of its own
    assert latents[0].mask is None
    mask = latents[1].mask
    assert mask is not None
    assert mask.shape == (1, 8, 8)
    assert mask[0, :, 0].round().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(pickle.loads(pickle.dumps(latents))[1].mask, mask)
    entry = latents.masks[1]
    assert entry is not None
    entry.unlink()
    with pytest.raises(DataError, match=r"\.mask"):
        latents[1]


def test_latents_are_picklable_and_small(items: tuple[Item, ...]) -> None:
    latents = run(items, Encoder())
    content = pickle.dumps(latents)
    assert len(content) < 500 * len(items)
    assert torch.equal(pickle.loads(content)[2].mean, latents[2].mean)


def test_the_cache_is_private_and_holds_nothing_else(
    isolated_cache: Path, items: tuple[Item, ...]
) -> None:
    latents = run(items, Encoder())
    assert isolated_cache.stat().st_mode & 0o777 == 0o700
    assert entries(isolated_cache) == sorted(latents.paths)


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    isolated_cache: Path, items: tuple[Item, ...]
) -> None:
    (isolated_cache / "latents").write_bytes(b"")
    with pytest.raises(DiskError):
        run(items, Encoder())


def test_what_is_missing_is_counted_without_making_it(items: tuple[Item, ...]) -> None:
    cuts = [Cut(item, SHAPE) for item in items]
    assert missing_latents(cuts, "vae") == 3
    run(cuts[:1], Encoder())
    run(cuts[1:2], Encoder(tiled=True))
    flipped = Cut(items[0], SHAPE, PLAIN._replace(flip=True))
    assert missing_latents([*cuts, cuts[2], flipped], "vae") == 2
    assert missing_latents(cuts, "another") == 3
    assert missing_latents([], "vae") == 0


def test_the_size_of_an_entry_is_known_before(items: tuple[Item, ...]) -> None:
    (path,) = run([Cut(items[0], Shape(64, 128))], Encoder()).paths
    estimate = latent_bytes(Shape(64, 128), channels=3, factor=8)
    assert estimate - 256 < path.stat().st_size <= estimate


def test_progress_counts_cuts_found_and_made_and_then_masks(items: tuple[Item, ...]) -> None:
    seen: list[tuple[int, int]] = []
    run(items[:1], Encoder())
    mask = Mask(path=items[0].path, sha256=items[0].sha256, alpha=False)
    cuts = [Cut(item, SHAPE) for item in (*items, items[2], replace(items[2], mask=mask))]
    for _ in range(2):
        cache_latents(cuts, Encoder(), encoder="vae", progress=lambda *n: seen.append(n))
    found = [(1, 6), (2, 6), (5, 6), (6, 6)]
    assert seen == found * 2


# ------------------------------------------------------------------------------- other processes

FILL = """
import sys
from hashlib import sha256
from pathlib import Path
import torch
from eri.data.cache import cache_latents
from eri.data.cuts import Cut, View
from eri.data.items import Item
from eri.data.shapes import Shape
torch.set_num_threads(1)
path, count = Path(sys.argv[1]), int(sys.argv[2])
digest = sha256(path.read_bytes()).hexdigest()
item = Item(path=path, captions=("x",), width=100, height=80, sha256=digest, source=0)
cuts = [Cut(item, Shape(64, 64), View(across=place)) for place in range(count)]
encode = lambda images: (images, images, False)
print("ready", flush=True)
sys.stdin.readline()
latents = cache_latents(cuts, encode, encoder="vae", progress=lambda *n: print(n[0], flush=True))
print(all(torch.equal(latents[n].mean, latents[n].std) for n in range(count)), flush=True)
"""


def start_filling(item: Item, count: int) -> subprocess.Popen[str]:
    """A process that is ready to fill the cache with so many views of an image."""
    command = [sys.executable, "-c", FILL, str(item.path), str(count)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_two_processes_fill_one_cache_and_a_kill_costs_at_most_the_entry_in_flight(
    isolated_cache: Path, items: tuple[Item, ...]
) -> None:
    with start_filling(items[0], 1000) as killed, start_filling(items[0], 40) as other:
        for process in (killed, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in (killed, other):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert killed.stdout is not None
        told = [killed.stdout.readline() for _ in range(80)]
        killed.send_signal(signal.SIGKILL)
        told += killed.stdout.readlines()
        assert other.stdout is not None
        assert other.stdout.readlines()[-1] == "True\n"
    assert other.returncode == 0
    done = len([line for line in told if line.endswith("\n")])
    found = [path for path in entries(isolated_cache) if path.suffix == ".latent"]
    latents = Latents(found)
    assert all(torch.equal(latents[n].mean, latents[n].std) for n in range(len(found)))
    assert 80 <= done <= len(found) <= done + 1 < 1000
    debris = [path for path in entries(isolated_cache) if path.suffix != ".latent"]
    assert len(debris) <= 1
