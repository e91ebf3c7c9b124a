import pytest
import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, Predict, Sampler, sample

IMAGE = torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8)
SAMPLERS: tuple[Sampler, ...] = ("euler", "dpmpp_2m_karras")
SCHEDULES = {
    "epsilon": NoiseSchedule(),
    "v": NoiseSchedule(prediction="v_prediction"),
    "v-zero-snr": NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True),
}


def ideal(schedule: NoiseSchedule, mean: Tensor, spread: float = 0.0) -> Predict:
    """The best net there is for images that are normal around `mean`, independent in each pixel."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        place = t.float().clamp(0, 999)
        low = schedule.alphas_cumprod[place.long()]
        high = schedule.alphas_cumprod[(place.long() + 1).clamp(max=999)]
        alpha = torch.lerp(low, high, place - place.floor())[:, None, None, None]
        gain = alpha.sqrt() * spread**2 / (alpha * spread**2 + 1 - alpha)
        image = mean + gain * (x - alpha.sqrt() * mean)
        noise = (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
        if schedule.prediction == "epsilon":
            return noise
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * image

    return predict


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_net_that_knows_the_image_leads_to_it(sampler: Sampler, kind: str) -> None:
    schedule = SCHEDULES[kind]
    torch.manual_seed(0)
    drawn = sample(
        ideal(schedule, IMAGE), torch.randn(1, 1, 8, 8), schedule, sampler=sampler, steps=20
    )
    assert (drawn - IMAGE).abs().max() < 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bright_images_come_out_as_bright_as_they_were_with_zero_terminal_snr_alone(
    sampler: Sampler,
) -> None:
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))

    def brightness(kind: str) -> float:
        predict = ideal(SCHEDULES[kind], torch.tensor(3.0), spread=0.5)
        return sample(predict, noise, SCHEDULES[kind], sampler=sampler, steps=25).mean().item()

    assert brightness("v-zero-snr") == pytest.approx(3.0, abs=0.02)
    assert brightness("v") < 2.95  # the noise that it starts from has not the leak it learned from


@pytest.mark.parametrize("steps", [1, 8, 25])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_drawn_from_the_last_timestep_on(
    sampler: Sampler, kind: str, steps: int
) -> None:
    asked: list[float] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return torch.zeros_like(x)

    drawn = sample(predict, torch.randn(1, 1, 8, 8), SCHEDULES[kind], sampler=sampler, steps=steps)
    assert drawn.isfinite().all()
    assert len(asked) == steps
    assert asked == sorted(asked, reverse=True)
    assert steps == 1 or asked[0] == 999


def test_the_same_noise_gives_the_same_picture() -> None:
    noise = torch.randn(2, 4, 8, 8)

    def draw(start: Tensor) -> Tensor:
        return sample(
            lambda x, t: x.sin(), start, NoiseSchedule(), sampler="dpmpp_2m_karras", steps=5
        )

    assert torch.equal(draw(noise), draw(noise))
    assert not torch.equal(draw(noise), draw(noise + 0.1))
