import pickle
from dataclasses import replace
from pathlib import Path

from eri.data.items import Dataset, Fault, Item, Mask


def item(name: str = "a.png", **changes: object) -> Item:
    plain = Item(
        path=Path(name), captions=("a fox",), width=40, height=20, sha256="00" * 32, source=0
    )
    return replace(plain, **changes)


def fingerprint(*items: Item) -> str:
    return Dataset(items=items, skipped=(), notes=()).fingerprint


def test_the_fingerprint_is_of_bytes_captions_masks_and_order() -> None:
    mask = Mask(path=Path("m"), sha256="22" * 32, alpha=False)
    prints = [
        fingerprint(item()),
        fingerprint(item(captions=("a cat",))),
        fingerprint(item(captions=("a", "fox"))),
        fingerprint(item(sha256="11" * 32)),
        fingerprint(item(mask=mask)),
        fingerprint(item(source=1)),
        fingerprint(item(), item(captions=("a cat",))),
        fingerprint(item(captions=("a cat",)), item()),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(item()) == fingerprint(item("elsewhere/b.png", width=41))


def test_items_travel_to_other_processes() -> None:
    one = item(mask=Mask(path=Path("m"), sha256="22" * 32, alpha=True))
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_fault_is_a_line_fit_to_print() -> None:
    assert str(Fault(Path("a\x1b.png"), "damaged")) == "a\\x1b.png: damaged"
    assert str(Fault(Path("metadata.csv"), "no text", 3)) == "metadata.csv:3: no text"
