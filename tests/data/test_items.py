import pickle
from dataclasses import replace
from pathlib import Path

from eri.data.items import Fault, Item, Mask


def item(name: str = "a.png", **changes: object) -> Item:
    plain = Item(
        path=Path(name), captions=("a fox",), width=40, height=20, sha256="00" * 32, source=0
    )
    return replace(plain, **changes)


def test_items_travel_to_other_processes() -> None:
    one = item(mask=Mask(path=Path("m"), sha256="22" * 32, alpha=True))
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_fault_is_a_line_fit_to_print() -> None:
    assert str(Fault(Path("a\x1b.png"), "damaged")) == "a\\x1b.png: damaged"
    assert str(Fault(Path("metadata.csv"), "no text", 3)) == "metadata.csv:3: no text"
