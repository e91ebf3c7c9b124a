"""Broken images: pixels, or a DataError that names the file; nothing else is said."""

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from eri.data import images
from eri.data.images import FORMATS, decode, pillow_warnings_ignored
from eri.errors import DataError
from tests.torture import mutations
from tests.torture.fuzz import fuzz_images
from tests.torture.mutations import CORPUS


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_images_are_decoded_or_refused(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    result = fuzz_images(1000, seed, tmp_path)
    assert not result.broken, result.report()
    assert result.accepted + result.refused == result.cases == 1000
    assert result.accepted > 100, "the mutations no longer leave an image whole"
    assert result.refused > 100, "the mutations no longer break an image"
    assert capfd.readouterr() == ("", "")


def test_every_format_is_mutated() -> None:
    found = {Image.open(BytesIO(content)).format for content in mutations._images()}
    assert found == set(FORMATS)


@pytest.mark.parametrize("path", sorted((CORPUS / "images").iterdir()), ids=lambda path: path.stem)
def test_images_of_the_corpus_are_refused_by_name(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pillow_warnings_ignored(), pytest.raises(DataError) as refused:
        decode(path, pixel_cap=1_000_000)
    assert refused.value.where == str(path)
    assert capfd.readouterr() == ("", "")


def test_the_fuzzer_sees_a_leak_and_a_word_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a decoder whose errors come out, and one that lets libtiff talk."""
    rgb = images._rgb

    def talks(image: Image.Image, background: str) -> object:
        os.write(2, b"_TIFFVSetField: oh dear\n")
        return rgb(image, background)

    with monkeypatch.context() as patch:
        patch.setattr(images, "_rgb", talks)
        result = fuzz_images(100, 1, tmp_path)
        assert result.broken > 10
        assert all("wrote to stderr" in case.what for case in result.outside)
    monkeypatch.setattr(images, "_read", lambda file, cap, use: use(Image.open(file.stream)))
    result = fuzz_images(300, 1, tmp_path)
    assert any("UnidentifiedImageError" in case.what for case in result.outside)
