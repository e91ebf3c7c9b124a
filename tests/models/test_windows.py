from collections.abc import Sequence

import pytest
import torch

from eri.models.windows import Joined, Marks, cut, join, shares, spread

S, E, P = 900, 901, 0
OPEN_CLIP, CLIP = Marks(S, E, P), Marks(S, E, E)


def whole(tokens: Sequence[int], length: int = 6, joined: Joined = "ui") -> list[int]:
    """The shares of a prompt without weights."""
    return shares([len(tokens)], length=length, joined=joined)


@pytest.mark.parametrize(
    ("tokens", "windows"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3), (225, 3), (226, 4)]
)
@pytest.mark.parametrize("joined", ["ui", "kohya"])
def test_a_text_is_divided_where_a_window_is_full(
    joined: Joined, tokens: int, windows: int
) -> None:
    found = whole(range(tokens), 77, joined)
    assert len(found) == windows
    assert sum(found) == tokens
    assert found[:-1] == [75] * (windows - 1)


@pytest.mark.parametrize(
    ("parts", "ui", "kohya"),
    [
        ([], [0], [0]),
        ([70, 5], [75], [75]),
        ([70, 7], [70, 7], [75, 2]),  # a short part goes whole into the next window
        ([70, 8], [75, 3], [75, 3]),
        ([75, 3, 2], [75, 5], [75, 5]),
        ([70, 3, 4, 80], [73, 75, 9], [75, 75, 7]),
        ([200, 20, 6, 0], [75, 75, 70, 6], [75, 75, 75, 1]),
    ],
)
def test_short_parts_with_weights_stay_whole(
    parts: list[int], ui: list[int], kohya: list[int]
) -> None:
    assert shares(parts, length=77, joined="ui") == ui
    assert shares(parts, length=77, joined="kohya") == kohya


def test_a_part_that_no_window_holds_is_divided() -> None:
    assert shares([2, 7, 3], length=6, joined="ui") == [4, 4, 1 + 3]


def test_weights_stand_where_their_tokens_do() -> None:
    tokens, weights = [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]
    for parts, windows in (([5], 2), ([3, 2], 2), ([3, 2], 3), ([5], 1)):
        held = shares(parts, length=6, joined="ui")
        ids = cut(tokens, held, OPEN_CLIP, length=6, windows=windows, joined="ui")
        found = spread(weights, held, length=6, windows=windows)
        assert [[i / 10 if i < 10 and i else 1 for i in window] for window in ids] == found
    found = spread(weights, whole(tokens, joined="kohya"), length=6, windows=2)
    assert found == [[1, 0.1, 0.2, 0.3, 0.4, 1], [1, 0.5, 1, 1, 1, 1]]


def test_ui_windows_are_whole_texts() -> None:
    def cut_ui(tokens: list[int], marks: Marks = OPEN_CLIP) -> list[list[int]]:
        return cut(tokens, whole(tokens), marks, length=6, windows=2, joined="ui")

    assert cut_ui([1, 2, 3, 4, 5]) == [[S, 1, 2, 3, 4, E], [S, 5, E, P, P, P]]
    assert cut_ui([1, 2, 3, 4, 5], CLIP) == [[S, 1, 2, 3, 4, E], [S, 5, E, E, E, E]]
    assert cut_ui([1, 2, 3, 4]) == [[S, 1, 2, 3, 4, E], [S, E, P, P, P, P]]
    assert cut_ui([]) == [[S, E, P, P, P, P], [S, E, P, P, P, P]]
    assert cut_ui([*range(1, 12)]) == [[S, 1, 2, 3, 4, E], [S, 5, 6, 7, 8, E]]
    short = cut([1, 2, 3, 4, 5], [3, 2], OPEN_CLIP, length=6, windows=2, joined="ui")
    assert short == [[S, 1, 2, 3, E, P], [S, 4, 5, E, P, P]]


def test_kohya_cuts_one_text_with_one_end() -> None:
    def cut_kohya(tokens: list[int], marks: Marks = OPEN_CLIP) -> list[list[int]]:
        return cut(tokens, whole(tokens), marks, length=6, windows=2, joined="kohya")

    # an end in a full window, as its last token is neither end nor filling
    assert cut_kohya([1, 2, 3, 4, 5]) == [[S, 1, 2, 3, 4, E], [S, 5, E, P, P, P]]
    # the end of the text begins the second window
    assert cut_kohya([1, 2, 3, 4]) == [[S, 1, 2, 3, 4, E], [S, E, P, P, P, P]]
    # the end fits into the first window, and the second begins with one all the same
    assert cut_kohya([1, 2, 3]) == [[S, 1, 2, 3, E, P], [S, E, P, P, P, P]]
    assert cut_kohya([]) == [[S, E, P, P, P, P], [S, E, P, P, P, P]]
    assert cut_kohya([*range(1, 12)]) == [[S, 1, 2, 3, 4, E], [S, 5, 6, 7, 8, E]]
    # a token of the prompt that is also what fills up is taken for that
    assert cut_kohya([1, 2, 3, P, P, 6]) == [[S, 1, 2, 3, P, P], [S, E, 6, E, P, P]]
    # where the end fills up, the last token is an end anyway
    assert cut_kohya([1, 2, 3, 4, 5], CLIP) == [[S, 1, 2, 3, 4, E], [S, 5, E, E, E, E]]
    assert cut_kohya([1, 2, 3], CLIP) == [[S, 1, 2, 3, E, E], [S, E, E, E, E, E]]


@pytest.mark.parametrize("marks", [OPEN_CLIP, CLIP], ids=["open_clip", "clip"])
def test_one_window_is_the_same_in_both(marks: Marks) -> None:
    for tokens in ([], [1], [P, 1], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        ui, kohya = (
            cut(tokens, whole(tokens), marks, length=6, windows=1, joined=joined)
            for joined in ("ui", "kohya")
        )
        assert ui == kohya


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        ("ui", [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]),
        ("kohya", [0, 1, 2, 11, 12, 21, 22, 23]),
    ],
)
def test_join(joined: Joined, expected: list[int]) -> None:
    numbers = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]])
    states = torch.stack([numbers, numbers + 100])[..., None]  # [2, 3, 4, 1]
    joint = join(states, joined=joined)
    assert joint[0, :, 0].tolist() == expected
    assert joint[1, :, 0].tolist() == [number + 100 for number in expected]
    one = join(states[:, :1], joined=joined)
    assert one[0, :, 0].tolist() == [0, 1, 2, 3]
