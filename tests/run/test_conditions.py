from pathlib import Path

import pytest
import torch

from eri.data import Shape
from eri.models import load_unet
from eri.models.unet import UNet
from eri.run.conditions import Condition, stack
from eri.run.micro_batch import size_tensor

PROMPTS = [Condition(torch.randn(7, 128), torch.randn(64)) for _ in range(3)]
SIZES = [torch.tensor([100.0, 1022, 0, n, 64, 64]) for n in range(3)]


@pytest.fixture(scope="module")
def unet(sdxl: Path) -> UNet:
    return load_unet(sdxl)


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
