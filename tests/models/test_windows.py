import pytest
import torch

from eri.models.windows import Joined, Marks, cut, join, needed

S, E, P = 900, 901, 0
OPEN_CLIP, CLIP = Marks(S, E, P), Marks(S, E, E)


@pytest.mark.parametrize(
    ("tokens", "windows"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3), (225, 3), (226, 3)]
)
def test_needed(tokens: int, windows: int) -> None:
    assert needed(tokens, 77) == windows


def test_ui_windows_are_whole_texts() -> None:
    def cut_ui(tokens: list[int], marks: Marks = OPEN_CLIP) -> list[list[int]]:
        return cut(tokens, marks, length=6, windows=2, joined="ui")

    assert cut_ui([1, 2, 3, 4, 5]) == [[S, 1, 2, 3, 4, E], [S, 5, E, P, P, P]]
    assert cut_ui([1, 2, 3, 4, 5], CLIP) == [[S, 1, 2, 3, 4, E], [S, 5, E, E, E, E]]
    assert cut_ui([1, 2, 3, 4]) == [[S, 1, 2, 3, 4, E], [S, E, P, P, P, P]]
    assert cut_ui([]) == [[S, E, P, P, P, P], [S, E, P, P, P, P]]
    assert cut_ui([*range(1, 12)]) == [[S, 1, 2, 3, 4, E], [S, 5, 6, 7, 8, E]]


def test_kohya_cuts_one_text_with_one_end() -> None:
    def cut_kohya(tokens: list[int], marks: Marks = OPEN_CLIP) -> list[list[int]]:
        return cut(tokens, marks, length=6, windows=2, joined="kohya")

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
            cut(tokens, marks, length=6, windows=1, joined=joined) for joined in ("ui", "kohya")
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
