from pathlib import Path

import pytest

from tests.families import single_file

FILLED_WITH = {"sd15_real": [49407], "sd21": [0], "sdxl": [49407, 0]}
"""Families by their fixtures, and what fills a prompt up, of each encoder."""


@pytest.fixture(params=FILLED_WITH)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(request: pytest.FixtureRequest, family: str) -> Path:
    return request.getfixturevalue(family)


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    return single_file(folder, tmp_path / "model.safetensors", loose=True)
