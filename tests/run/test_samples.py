import hashlib
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from eri.config import DataSource
from eri.data import (
    PLAIN,
    Batches,
    Item,
    Shape,
    TextStates,
    cache_latents,
    cache_texts,
    size_ids,
)
from eri.run.image_set import ImageSet
from eri.run.samples import Samples, Steps, micro_batches, texts_drawn, texts_of

SHAPE = Shape(64, 64)
SEED = 3


def images(folder: Path, count: int = 3, **settings: object) -> ImageSet:
    """Pictures of one shape, dark on the left, each in its own red, with captions of tags."""
    items = []
    for number in range(count):
        path = folder / f"{number}.png"
        picture = Image.new("RGB", (80, 64), (200 + number, 0, 0))
        picture.paste((0, 0, 0), (0, 0, 40, 64))
        picture.save(path)
        captions = (f"cat {number}, sitting, indoors",)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        items.append(
            Item(path=path, captions=captions, width=80, height=64, sha256=digest, source=0)
        )
    source = DataSource.model_validate({"path": folder, **settings})
    return ImageSet(tuple(items), (SHAPE,) * count, (source,), 64)


def encode(pixels: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Stands for a VAE: every eighth pixel."""
    mean = pixels[..., ::8, ::8]
    return mean, mean.abs() + 0.5, False


def states(text: str) -> TextStates:
    """Stands for a text encoder: the letters themselves."""
    return TextStates(torch.tensor([[float(ord(letter))] for letter in text]), torch.ones(1))


def text(context: Tensor) -> str:
    return "".join(chr(int(code)) for code in context.flatten())


def turned(mean: Tensor) -> bool:
    """Whether the dark side is on the right."""
    return bool(mean[0, 0, 0] > mean[0, 0, -1])


def encoded(found: ImageSet, batches: Batches | None = None, numbers: range = range(0)) -> Samples:
    latents = cache_latents(found.cuts, encode, encoder="pixels")
    wanted = list(texts_of(found))
    wanted += texts_drawn(found, batches, numbers, SEED) if batches else []
    texts = {
        weighted: cache_texts([t for t, mode in wanted if mode == weighted], states, encoder="abc")
        for weighted in (False, True)
    }
    return Samples(found, latents, texts, windows=1, seed=SEED)


def test_without_augmentation_a_sample_is_its_image(tmp_path: Path) -> None:
    samples = encoded(images(tmp_path, weight=0.5))
    for number in (0, 7, 100):
        sample = samples.of_number(1, number)
        assert torch.equal(sample.mean, samples[1].mean)
        assert text(sample.context) == text(samples[1].context) == "cat 1, sitting, indoors"
    assert samples[2].file == f"{tmp_path.name}/2.png"
    assert (samples[2].weight, samples[2].mask) == (0.5, None)
    assert samples[2].time_ids is not None
    assert samples[2].time_ids.tolist() == [*size_ids(80, 64, SHAPE, PLAIN)]


def test_versions_and_captions_are_drawn_by_the_number_of_the_sample(tmp_path: Path) -> None:
    found = images(tmp_path, flip=True, caption={"shuffle_tags": True, "drop": 0.2})
    batches = Batches(found.shapes, batch_size=3, seed=SEED)
    samples = encoded(found, batches, range(40))
    shown = [
        samples.of_number(*pair)
        for step in range(40)
        for pair in zip(*batches.batch(step), strict=True)
    ]
    flips = Counter(turned(sample.mean) for sample in shown)
    assert min(flips.values()) > 40
    captions = Counter(text(sample.context) for sample in shown)
    assert 12 < captions[""] < 40
    assert 15 < len(captions) <= 3 * 6 + 1  # the orders of three tags
    pairs = [pair for step in (39, 5) for pair in zip(*batches.batch(step), strict=True)]
    again = [samples.of_number(*pair) for pair in pairs]
    for one, other in zip(again, [*shown[117:], *shown[15:18]], strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.context, other.context)


@pytest.mark.parametrize("folder", ["{}", "../photos", "."])
def test_a_run_tells_of_images_by_the_name_of_their_folder_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    photos = tmp_path / "photos"
    (photos / "trees").mkdir(parents=True)
    monkeypatch.chdir(photos)
    found = images(Path(folder.format(photos)) / "trees")
    source = found.sources[0].model_copy(update={"path": Path(folder.format(photos))})
    (photos / "trees" / "0.png").rename(photos / "trees" / "\x1b.png")
    items = (replace(found.items[0], path=found.items[0].path.with_name("\x1b.png")),)
    samples = encoded(ImageSet(items, found.shapes[:1], (source,), 64))
    assert samples[0].file == r"photos/trees/\x1b.png"


def test_a_mirrored_sample_has_the_ids_of_its_own_cut(tmp_path: Path) -> None:
    found = images(tmp_path, flip=True, crop_jitter=0.2, variants=5)
    samples = encoded(found)
    seen = set()
    for number in range(60):
        sample = samples.of_number(0, number)
        assert sample.time_ids is not None
        at = [
            version
            for version, view in enumerate(found.views[0])
            if torch.equal(sample.mean, samples.latents[version].mean)
            and sample.time_ids.tolist() == [*size_ids(80, 64, SHAPE, view)]
        ]
        assert at
        seen.update(at)
    assert seen == set(range(10))


def test_where_nothing_is_drawn_a_plain_image_is_shown(tmp_path: Path) -> None:
    found = images(tmp_path, caption={"drop_tags": 0.9, "trigger": "sks"})
    assert text(encoded(found)[0].context) == "sks, cat 0, sitting, indoors"


def test_a_step_has_its_micro_batches_and_the_last_one_what_is_left(tmp_path: Path) -> None:
    found = images(tmp_path, count=5)
    batches = Batches(found.shapes, batch_size=2, seed=SEED, epochs=1)
    assert batches.total == 3
    steps = Steps(encoded(found), batches, accumulate=2)
    assert [[len(batch) for batch in steps(step)] for step in (0, 1)] == [[2, 2], [1]]
    numbers = [number for step in (0, 1) for batch in steps(step) for number in batch.numbers]
    assert numbers == list(range(5))
    assert micro_batches(batches, 2, range(2)) == range(3)
    files = Counter(file for step in (0, 1) for batch in steps(step) for file in batch.files)
    assert len(files) == 5


@pytest.mark.parametrize(
    ("at_once", "sizes"),
    [(None, [4, 4]), (4, [4, 4]), (3, [3, 1, 3, 1]), (2, [2] * 4), (1, [1] * 8), (9, [4, 4])],
)
def test_a_batch_is_run_in_parts_of_the_same_samples_in_the_same_order(
    tmp_path: Path, at_once: int | None, sizes: list[int]
) -> None:
    found = images(tmp_path, count=7, flip=True)
    batches = Batches(found.shapes, batch_size=4, seed=SEED, epochs=3)
    samples = encoded(found, batches, range(6))
    whole, parts = Steps(samples, batches, 2), Steps(samples, batches, 2, at_once)
    assert [len(part) for part in parts(0)] == sizes
    for step in range(3):
        one = [pair for b in whole(step) for pair in zip(b.numbers, b.samples, strict=True)]
        other = [pair for b in parts(step) for pair in zip(b.numbers, b.samples, strict=True)]
        assert [number for number, _ in one] == [number for number, _ in other]
        assert all(torch.equal(a.mean, b.mean) for (_, a), (_, b) in zip(one, other, strict=True))
        assert [a.file for _, a in one] == [file for part in parts(step) for file in part.files]


def test_what_reads_ahead_is_small_enough_to_send(tmp_path: Path) -> None:
    found = images(tmp_path)
    steps = Steps(encoded(found), Batches(found.shapes, batch_size=2, seed=SEED), 1)
    sent = pickle.dumps(steps)
    assert len(sent) < 10_000
    here, there = steps(4), pickle.loads(sent)(4)
    assert here[0].files == there[0].files
    assert torch.equal(here[0].samples[0].mean, there[0].samples[0].mean)


def test_what_was_not_encoded_is_missed(tmp_path: Path) -> None:
    found = images(tmp_path, caption={"drop": 0.5})
    samples = encoded(found)
    with pytest.raises(Exception, match="missing or damaged"):
        for number in range(20):
            samples.of_number(0, number)
