"""docs/configuration.md says what the settings say."""

import runpy
from pathlib import Path

from eri.config.schema import Config
from eri.config.section import settings

ROOT = Path(__file__).parents[1]
WRITER = runpy.run_path(str(ROOT / "scripts" / "write_config_reference.py"))


def test_the_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == WRITER["page"](), "run python scripts/write_config_reference.py"


def test_every_setting_has_its_row_and_its_meaning() -> None:
    page = WRITER["page"]()
    leaves = [
        (key, field)
        for key, field in settings(Config)
        if not WRITER["is_section"](field.annotation)
    ]
    assert len(leaves) > 30
    for key, field in leaves:
        assert f"| `{'.'.join(key)}` |" in page
        assert field.description
        assert field.description.replace("|", "\\|") in page  # else it would end the cell
