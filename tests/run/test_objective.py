from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eri.adapters import attach
from eri.diffusion import NoiseSchedule, denoising_loss
from eri.models import load_unet
from eri.rng import generator, normal
from eri.run.objective import Objective, Sample, SampleBatch, validate
from tests.losses import losses

torch.manual_seed(0)
SAMPLES = [
    Sample(str(n), torch.randn(4, 8, 8), torch.full((4, 8, 8), 0.1), torch.randn(7, 32))
    for n in range(4)
]

SIZED = [
    replace(
        sample,
        context=torch.randn(7, 128),
        pooled=torch.randn(64),
        time_ids=torch.tensor([900.0, 700, 0, 10 * n, 64, 64]),
    )
    for n, sample in enumerate(SAMPLES)
]


@pytest.fixture
def objective(shallow: Path) -> Objective:
    return Objective(load_unet(shallow), NoiseSchedule(), seed=0, drops=False)


def test_a_sample_draws_the_same_in_every_batch(objective: Objective) -> None:
    whole = losses(objective, SampleBatch(SAMPLES, range(10, 14)))
    alone = losses(objective, SampleBatch(SAMPLES[2:3], range(12, 13)))
    torch.testing.assert_close(whole[2:3], alone)


def test_the_next_time_it_draws_something_else(objective: Objective) -> None:
    first = losses(objective, SampleBatch(SAMPLES[:1], range(1)))
    second = losses(objective, SampleBatch(SAMPLES[:1], range(1, 2)))
    assert not torch.allclose(first, second, rtol=1e-3)


def test_all_chance_is_in_what_was_drawn(objective: Objective) -> None:
    inputs = objective.draw(SampleBatch(SAMPLES, range(4)))
    assert inputs.keys() == {"mean", "std", "latent", "noise", "timesteps", "shares", "context"}
    chance = torch.get_rng_state()
    first = objective(inputs)
    assert torch.equal(torch.get_rng_state(), chance)
    objective.seed = 1
    assert torch.equal(objective(inputs), first)
    for name in ("latent", "noise", "timesteps"):
        other = objective.draw(SampleBatch(SAMPLES, range(4)))[name]
        assert not torch.equal(objective(inputs | {name: other}), first)


def test_the_seed_decides(objective: Objective) -> None:
    batch = SampleBatch(SAMPLES[:1], range(1))
    first = losses(objective, batch)
    objective.seed = 1
    assert not torch.allclose(losses(objective, batch), first, rtol=1e-3)


def test_dropout_is_drawn_from_the_samples_number(shallow: Path) -> None:
    unet = load_unet(shallow).train()
    adapter = attach(unet, rank=2, dropout=0.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    batch = SampleBatch(SAMPLES[:1], range(7, 8))

    def loss(*, drops: bool) -> torch.Tensor:
        return losses(Objective(unet, NoiseSchedule(), seed=0, drops=drops), batch)

    torch.manual_seed(1)
    first = loss(drops=True)
    torch.manual_seed(2)
    assert torch.equal(loss(drops=True), first)
    torch.manual_seed(3)
    assert not torch.equal(loss(drops=False), first)


@pytest.fixture
def sized(sdxl: Path) -> Objective:
    return Objective(load_unet(sdxl), NoiseSchedule(), seed=0, drops=False)


def test_sdxl_is_told_pooled_text_and_sizes_of_each_sample(sized: Objective) -> None:
    numbers = range(10, 12)
    std = torch.full((2, 4, 8, 8), 0.1)
    latents = torch.stack([sample.mean for sample in SIZED[:2]])
    latents = latents + std * normal((4, 8, 8), 0, "latent", samples=numbers)
    draws = [generator(0, "timestep", sample=number) for number in numbers]
    timesteps = torch.cat([torch.randint(1000, (1,), generator=draw) for draw in draws])
    context = torch.stack([sample.context for sample in SIZED[:2]])
    pooled = torch.stack([sample.pooled for sample in SIZED[:2] if sample.pooled is not None])
    sizes = torch.tensor([[900, 700, 0, 0, 64, 64], [900, 700, 0, 10, 64, 64]])

    def loss_told(pooled: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return denoising_loss(
            lambda x, t: sized.unet(x, t, context, pooled, sizes),
            latents,
            normal((4, 8, 8), 0, "noise", samples=numbers),
            timesteps,
            NoiseSchedule(),
        )

    loss = losses(sized, SampleBatch(SIZED[:2], numbers))
    torch.testing.assert_close(loss, loss_told(pooled, sizes))
    assert not torch.allclose(loss, loss_told(pooled.flip(0), sizes), rtol=1e-5)
    assert not torch.allclose(loss, loss_told(pooled, sizes.flip(0)), rtol=1e-5)


CHANGES = {"pooled": torch.zeros(64), "time_ids": torch.tensor([64.0, 64, 0, 0, 64, 64])}


@pytest.mark.parametrize("field", CHANGES)
def test_pooled_text_and_sizes_count_in_training_and_validation(
    sized: Objective, field: str
) -> None:
    other = replace(SIZED[0], **{field: CHANGES[field]})
    batches = [SampleBatch([sample, SIZED[1]], range(2)) for sample in (SIZED[0], other)]
    before, after = (losses(sized, batch) for batch in batches)
    assert abs(before[0] - after[0]) > 1e-4 * before[0]
    torch.testing.assert_close(before[1], after[1])  # the other sample has its own
    assert validate(sized, [other]).mean != pytest.approx(validate(sized, SIZED[:1]).mean, rel=1e-5)


@pytest.mark.parametrize("field", CHANGES)
def test_a_model_without_them_learns_the_same(objective: Objective, field: str) -> None:
    told = replace(SAMPLES[0], **{field: CHANGES[field]})
    batches = [SampleBatch([sample], range(1)) for sample in (SAMPLES[0], told)]
    assert torch.equal(*(losses(objective, batch) for batch in batches))


def test_validation_repeats_exactly_and_has_a_loss_for_each_third(objective: Objective) -> None:
    first = validate(objective, SAMPLES[:2])
    torch.manual_seed(5)
    assert validate(objective, SAMPLES[:2]) == first
    eighths = [first.thirds[0] * 3, first.thirds[1] * 2, first.thirds[2] * 3]
    assert sum(eighths) / 8 == pytest.approx(first.mean, rel=1e-5)


def test_validation_in_parts_is_the_same(objective: Objective) -> None:
    whole, parts = (validate(objective, SAMPLES[:2], at_once=count) for count in (8, 3))
    assert parts.mean == pytest.approx(whole.mean, rel=1e-5)
    assert parts.thirds == pytest.approx(whole.thirds, rel=1e-5)


def test_validation_leaves_training_on(objective: Objective) -> None:
    objective.unet.train()
    validate(objective, SAMPLES[:1])
    assert objective.unet.training


LEFT = torch.zeros(1, 8, 8)
LEFT[..., :4] = 1


def masked(number: int, mask: torch.Tensor | None, unmasked_weight: float = 0.0) -> Sample:
    return replace(SAMPLES[number], mask=mask, unmasked_weight=unmasked_weight)


@pytest.mark.parametrize("measure", ["trained", "held out"])
def test_a_mask_chooses_what_counts(objective: Objective, measure: str) -> None:
    def loss(mask: torch.Tensor | None, unmasked_weight: float = 0.0) -> float:
        sample = masked(0, mask, unmasked_weight)
        if measure == "held out":
            return validate(objective, [sample]).mean
        return losses(objective, SampleBatch([sample], range(1))).item()

    whole, left, right = loss(None), loss(LEFT), loss(1 - LEFT)
    assert left != pytest.approx(right, rel=1e-3)
    assert whole == pytest.approx((left + right) / 2, rel=1e-5)
    assert loss(LEFT, 0.5) == pytest.approx((left + right / 2) / 1.5, rel=1e-5)
    assert loss(torch.full_like(LEFT, 0.25), 0.5) == pytest.approx(whole, rel=1e-5)


def test_beside_a_masked_sample_the_others_count_whole(objective: Objective) -> None:
    alone = losses(objective, SampleBatch([SAMPLES[1]], range(1, 2)))
    beside = losses(objective, SampleBatch([masked(0, LEFT), SAMPLES[1]], range(2)))
    torch.testing.assert_close(beside[1:], alone)


def test_without_masks_and_weights_the_loss_is_the_plain_one_bit_for_bit(
    objective: Objective,
) -> None:
    numbers = range(3)
    latents = torch.stack([s.mean for s in SAMPLES[:3]]) + 0.1 * normal(
        (4, 8, 8), 0, "latent", samples=numbers
    )
    draws = [generator(0, "timestep", sample=number) for number in numbers]
    context = torch.stack([sample.context for sample in SAMPLES[:3]])
    plain = denoising_loss(
        lambda x, t: objective.unet(x, t, context),
        latents,
        normal((4, 8, 8), 0, "noise", samples=numbers),
        torch.stack([torch.randint(1000, (), generator=draw) for draw in draws]),
        NoiseSchedule(),
    )
    assert torch.equal(losses(objective, SampleBatch(SAMPLES[:3], numbers)), plain)


def test_a_samples_weight_is_a_factor_of_its_loss_in_training_alone(objective: Objective) -> None:
    twice = [replace(SAMPLES[0], weight=2.0), SAMPLES[1]]
    before = losses(objective, SampleBatch(SAMPLES[:2], range(2)))
    after = losses(objective, SampleBatch(twice, range(2)))
    assert torch.equal(after, before * torch.tensor([2.0, 1.0]))
    assert validate(objective, twice) == validate(objective, SAMPLES[:2])


def test_micro_batches_learn_what_the_whole_batch_does(shallow: Path) -> None:
    samples = [
        replace(masked(0, LEFT), weight=2.0),
        masked(1, None),
        replace(masked(2, 1 - LEFT, 0.5), weight=0.25),
        masked(3, torch.zeros_like(LEFT)),
    ]

    def gradient(*cuts: slice) -> torch.Tensor:
        unet = load_unet(shallow)
        (first, *_) = list(attach(unet, rank=2).layers.values())
        torch.nn.init.ones_(first.lora_b.weight)
        objective = Objective(unet, NoiseSchedule(), seed=0, drops=False)
        for cut in cuts:
            batch = SampleBatch(samples[cut], range(4)[cut])
            (losses(objective, batch).sum() / len(samples)).backward()
        found = first.lora_a.weight.grad
        assert found is not None
        return found

    whole = gradient(slice(4))
    assert whole.norm() > 0
    torch.testing.assert_close(gradient(slice(1), slice(1, 4)), whole)


def test_what_is_told_of_a_batch_is_what_was_drawn_and_holds_none_of_it(
    objective: Objective,
) -> None:
    batch = SampleBatch(SAMPLES, range(10, 14))
    told = objective.told(batch)
    timesteps = objective.draw(batch)["timesteps"].tolist()
    assert told() == [f"{n}, timestep {t}" for n, t in enumerate(timesteps)]
    held = [cell.cell_contents for cell in told.__closure__ or ()]  # type: ignore[attr-defined]
    assert not any(isinstance(one, SampleBatch | Sample | torch.Tensor) for one in held)
