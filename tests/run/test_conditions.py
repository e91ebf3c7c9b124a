from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from eri.data import Shape
from eri.models import load_text, load_unet
from eri.models.text import TextEncoder
from eri.models.unet import UNet
from eri.run.conditions import Condition, encode, guide, size_tensor, stack

PROMPTS = [Condition(torch.randn(7, 128), torch.randn(64)) for _ in range(3)]
SIZES = [torch.tensor([100.0, 1022, 0, n, 64, 64]) for n in range(3)]


@pytest.fixture(scope="module")
def unet(sdxl: Path) -> UNet:
    return load_unet(sdxl)


class Words:
    """A text encoder whose states tell which text they are of, and which are read with weights."""

    def __init__(self, *, pools: bool) -> None:
        self.pools = pools
        self.weighted: list[bool | Sequence[bool]] = []

    def encode(
        self, prompts: Sequence[str], windows: int = 1, weighted: bool | Sequence[bool] = False
    ) -> tuple[Tensor, Tensor | None]:
        self.weighted.append(weighted)
        sizes = torch.tensor([float(len(prompt)) for prompt in prompts])
        context = sizes[:, None, None].expand(-1, 77 * windows, 4)
        return context, -sizes[:, None].expand(-1, 3) if self.pools else None

    def windows_needed(
        self, prompts: Sequence[str], weighted: bool | Sequence[bool] = False
    ) -> int:
        self.weighted.append(weighted)
        return max(-(-len(prompt) // 75) for prompt in prompts)


@pytest.fixture
def words() -> Callable[..., TextEncoder]:
    return lambda *, pools: cast(TextEncoder, Words(pools=pools))


def test_every_prompt_has_its_own_states_and_its_own_pooled_text(
    words: Callable[..., TextEncoder],
) -> None:
    one, three = encode(words(pools=True), ["a", "abc"], windows=2)
    assert one.pooled is not None
    assert three.pooled is not None
    assert (one.context.shape, one.pooled.shape) == ((154, 4), (3,))
    assert (one.context[0, 0], one.pooled[0]) == (1, -1)
    assert (three.context[0, 0], three.pooled[0]) == (3, -3)


def test_a_model_without_pooled_text_has_none(sd15: Path) -> None:
    text = load_text(sd15)
    (condition,) = encode(text, ["red star"], windows=1)
    assert condition.pooled is None
    assert torch.equal(condition.context, text.encode(["red star"])[0][0])


def test_a_picture_is_guided_by_its_prompt_and_its_negative_in_this_order(
    words: Callable[..., TextEncoder],
) -> None:
    prompt, negative = guide(words(pools=True), "prompt", "no")
    assert (prompt.context[0, 0], negative.context[0, 0]) == (6, 2)


def test_a_pair_is_read_in_the_windows_that_the_longer_of_the_two_needs(
    words: Callable[..., TextEncoder],
) -> None:
    for texts, states in [(("a", "b"), 77), (("a" * 80, ""), 154), (("a", "b" * 200), 231)]:
        pair = guide(words(pools=False), *texts)
        assert [len(condition.context) for condition in pair] == [states, states]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_caption_as_prompt_may_be_literal_and_a_negative_prompt_never_is(weighted: bool) -> None:
    words = Words(pools=False)
    guide(cast(TextEncoder, words), "(a:1.2)", "(b:1.2)", weighted=weighted)
    assert words.weighted == [[weighted, True]] * 2
    guide(cast(TextEncoder, words), "(a:1.2)", "(b:1.2)")
    assert words.weighted[2:] == [[True, True]] * 2


def test_captions_are_literal_unless_they_are_said_to_have_weights(sd15: Path) -> None:
    text, prompts = load_text(sd15), ["(red:1.5) star", "(blue:0.5) star"]
    for weighted in (False, True, [True, False]):
        found = torch.stack([it.context for it in encode(text, prompts, 1, weighted=weighted)])
        assert torch.equal(found, text.encode(prompts, weighted=weighted)[0])
    literal = encode(text, prompts, 1)[0].context
    assert torch.equal(literal, text.encode(prompts)[0][0])
    assert not torch.equal(literal, encode(text, prompts, 1, weighted=True)[0].context)


def test_a_batch_holds_each_samples_conditions_in_order(unet: UNet) -> None:
    context, pooled, time_ids = stack(unet, PROMPTS, SIZES)
    assert pooled is not None
    assert time_ids is not None
    assert torch.equal(context[2], PROMPTS[2].context)
    for row, prompt in zip(pooled, PROMPTS, strict=True):
        assert prompt.pooled is not None
        assert torch.equal(row, prompt.pooled)
    assert time_ids.tolist() == [sizes.tolist() for sizes in SIZES]


def test_sizes_stay_exact_beside_a_net_in_bf16(sdxl: Path) -> None:
    context, pooled, time_ids = stack(load_unet(sdxl, dtype=torch.bfloat16), PROMPTS, SIZES)
    assert pooled is not None
    assert time_ids is not None
    assert (context.dtype, pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert time_ids[0].tolist() == [100, 1022, 0, 0, 64, 64]
    assert time_ids.bfloat16()[0, 1].item() == 1024  # which is why


def test_a_model_without_pooled_text_is_told_the_states_alone(sd15: Path) -> None:
    conditions = stack(load_unet(sd15), PROMPTS, SIZES)
    assert conditions.pooled is None
    assert conditions.time_ids is None


def test_what_a_model_needs_and_does_not_get_is_named(unet: UNet) -> None:
    with pytest.raises(ValueError, match="needs the pooled text of every sample"):
        stack(unet, [PROMPTS[0], Condition(PROMPTS[1].context)], SIZES[:2])
    with pytest.raises(ValueError, match="needs the size ids of every sample"):
        stack(unet, PROMPTS[:2], [SIZES[0], None])


def test_the_size_ids_of_the_published_example() -> None:
    ids = size_tensor(512, 1024, Shape(1024, 1024))
    assert ids.dtype == torch.float32
    assert ids.tolist() == [1024, 512, 512, 0, 1024, 1024]
