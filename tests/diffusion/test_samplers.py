import pytest
import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, Sampler, sample

IMAGE = torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_karras"])
def test_a_net_that_knows_the_image_leads_to_it(sampler: Sampler, prediction: str) -> None:
    schedule = NoiseSchedule(prediction=prediction)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        place = t.float().clamp(0, 999)
        low = schedule.alphas_cumprod[place.long()]
        high = schedule.alphas_cumprod[(place.long() + 1).clamp(max=999)]
        alpha = torch.lerp(low, high, place - place.floor())[:, None, None, None]
        noise = (x - alpha.sqrt() * IMAGE) / (1 - alpha).sqrt()
        if prediction == "epsilon":
            return noise
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * IMAGE

    torch.manual_seed(0)
    drawn = sample(predict, torch.randn(1, 1, 8, 8), schedule, sampler=sampler, steps=20)
    assert (drawn - IMAGE).abs().max() < 0.1


def test_the_same_noise_gives_the_same_picture() -> None:
    noise = torch.randn(2, 4, 8, 8)

    def draw(start: Tensor) -> Tensor:
        return sample(
            lambda x, t: x.sin(), start, NoiseSchedule(), sampler="dpmpp_2m_karras", steps=5
        )

    assert torch.equal(draw(noise), draw(noise))
    assert not torch.equal(draw(noise), draw(noise + 0.1))
