from pathlib import Path

import pytest
import torch

from eri.adapters import attach
from eri.diffusion import NoiseSchedule
from eri.models import load_unet
from eri.run.objective import Objective, Sample, SampleBatch, validate

torch.manual_seed(0)
SAMPLES = [
    Sample(str(n), torch.randn(4, 8, 8), torch.full((4, 8, 8), 0.1), torch.randn(7, 32))
    for n in range(4)
]


@pytest.fixture
def objective(sd15: Path) -> Objective:
    return Objective(load_unet(sd15), NoiseSchedule(), seed=0, drops=False)


def test_a_sample_draws_the_same_in_every_batch(objective: Objective) -> None:
    whole = objective(SampleBatch(SAMPLES, range(10, 14)))
    alone = objective(SampleBatch(SAMPLES[2:3], range(12, 13)))
    torch.testing.assert_close(whole[2:3], alone)


def test_the_next_time_it_draws_something_else(objective: Objective) -> None:
    first = objective(SampleBatch(SAMPLES[:1], range(1)))
    second = objective(SampleBatch(SAMPLES[:1], range(1, 2)))
    assert not torch.allclose(first, second, rtol=1e-3)


def test_the_seed_decides(objective: Objective) -> None:
    batch = SampleBatch(SAMPLES[:1], range(1))
    first = objective(batch)
    objective.seed = 1
    assert not torch.allclose(objective(batch), first, rtol=1e-3)


def test_dropout_is_drawn_from_the_samples_number(sd15: Path) -> None:
    unet = load_unet(sd15).train()
    adapter = attach(unet, rank=2, dropout=0.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    batch = SampleBatch(SAMPLES[:1], range(7, 8))

    def loss(*, drops: bool) -> torch.Tensor:
        return Objective(unet, NoiseSchedule(), seed=0, drops=drops)(batch)

    torch.manual_seed(1)
    first = loss(drops=True)
    torch.manual_seed(2)
    assert torch.equal(loss(drops=True), first)
    torch.manual_seed(3)
    assert not torch.equal(loss(drops=False), first)


def test_validation_repeats_exactly_and_has_a_loss_for_each_third(objective: Objective) -> None:
    first = validate(objective, SAMPLES[:2])
    torch.manual_seed(5)
    assert validate(objective, SAMPLES[:2]) == first
    eighths = [first.thirds[0] * 3, first.thirds[1] * 2, first.thirds[2] * 3]
    assert sum(eighths) / 8 == pytest.approx(first.mean, rel=1e-5)


def test_validation_leaves_training_on(objective: Objective) -> None:
    objective.unet.train()
    validate(objective, SAMPLES[:1])
    assert objective.unet.training
