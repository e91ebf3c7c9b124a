"""Broken configs: settings, or one ConfigError that names the file, in 100 ms."""

from pathlib import Path

import pytest
import yaml

from eri.config import load_config, strict_yaml
from eri.errors import ConfigError
from tests.torture.fuzz import fuzz_yaml
from tests.torture.mutations import CONFIGS, CORPUS

TAKEN = {"no-such-day.yaml"}  # of the corpus: no day, but a folder may be called so


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_configs_are_settings_or_refused(tmp_path: Path, seed: int) -> None:
    result = fuzz_yaml(1500, seed, tmp_path)
    assert not result.broken, result.report()
    assert result.accepted + result.refused == result.cases == 1500
    assert result.accepted > 100, "the mutations no longer leave a config whole"
    assert result.refused > 500, "the mutations no longer break a config"
    assert result.slowest < 0.1, result.report()


@pytest.mark.parametrize("content", CONFIGS)
def test_what_is_mutated_is_a_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert load_config(path).model.path == "demo"


@pytest.mark.parametrize("path", sorted((CORPUS / "yaml").iterdir()), ids=lambda path: path.stem)
def test_configs_of_the_corpus_are_settings_or_refused(path: Path) -> None:
    if path.name in TAKEN:
        load_config(path)
        return
    with pytest.raises(ConfigError):
        load_config(path)


def test_the_fuzzer_sees_what_the_parser_below_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with PyYAML's own loader in the place of ours, its errors come out."""

    def parse(text: str, where: object) -> strict_yaml.Document:
        return strict_yaml.Document(value=yaml.safe_load(text), places={(): "here"})

    monkeypatch.setattr("eri.config.load.parse", parse)
    result = fuzz_yaml(300, 1, tmp_path)
    assert result.broken > 100
    assert any("ScannerError" in case.what for case in result.outside)
