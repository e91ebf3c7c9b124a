"""What a net was trained for is measured: on nets that are trained here, and on ideal ones."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, Predict, denoising_loss
from eri.errors import NonFiniteError
from eri.formats.unet_config import UNetConfigFields
from eri.models.spec import build_spec
from eri.models.unet import UNet
from eri.run.probe import Subject, probe_prediction, probe_zero_snr

EPSILON = NoiseSchedule()
PLAIN = NoiseSchedule(prediction="v_prediction")
RESCALED = NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True)
SCHEDULES = {"epsilon": EPSILON, "v": PLAIN, "v-zero-snr": RESCALED}


def waves(side: int) -> Tensor:
    """The slowest cosine over either side, each of unit energy, `[2, side, side]`."""
    places = (torch.arange(side) + 0.5) / side
    wave = (math.sqrt(2) * torch.cos(math.pi * places)).expand(side, side)
    return torch.stack([wave, wave.T])


def images(count: int, side: int, draws: torch.Generator, *, scale: float = 1.0) -> Tensor:
    """Latents of a random slope in each channel, with some detail, `[count, 4, side, side]`."""
    slopes = torch.randn(count, 4, 2, generator=draws)
    detail = torch.randn(count, 4, side, side, generator=draws)
    return scale * 0.7 * torch.einsum("bcw,whv->bchv", slopes, waves(side)) + 0.3 * detail


def subjects(predict: Predict, latents: Tensor) -> list[Subject]:
    return [Subject(latent, predict) for latent in latents]


class Trained:
    """Small U-Nets, trained from scratch on slopes when they are first asked for."""

    SIDE, SCALE = 16, 2.0

    def __init__(self) -> None:
        self.nets: dict[str, UNet] = {}
        draws = torch.Generator().manual_seed(100)
        self.images = images(256, self.SIDE, draws, scale=self.SCALE)

    def subjects(self, kind: str) -> list[Subject]:
        if kind not in self.nets:
            self.nets[kind] = self._train(kind)
        return subjects(partial(self._answer, self.nets[kind]), self.images)

    @staticmethod
    def _answer(unet: UNet, x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, torch.zeros(len(x), 2, 16))

    def _train(self, kind: str) -> UNet:
        unet = small_unet(self.SIDE)
        draws = torch.Generator().manual_seed(78)
        steps = {"untrained": 0, "epsilon": 60}.get(kind, 200)
        adam = torch.optim.Adam(unet.parameters(), lr=5e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1, (step + 1) / 20) * (1 - 0.95 * step / max(steps, 1))
        )
        for _ in range(steps):
            latents = images(16, self.SIDE, draws, scale=self.SCALE)
            noise = torch.randn(latents.shape, generator=draws)
            timesteps = torch.randint(500, 1000, (16,), generator=draws)
            predict = partial(self._answer, unet)
            loss = denoising_loss(predict, latents, noise, timesteps, SCHEDULES[kind]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            decay.step()
        return unet


def small_unet(side: int) -> UNet:
    """Two levels of SD1.5's topology, with its one transformer in the middle."""
    torch.manual_seed(1)
    fields = UNetConfigFields(
        in_channels=4,
        out_channels=4,
        block_channels=(16, 16),
        layers_per_block=1,
        down_depths=((0,), (0,)),
        mid_depth=1,
        up_depths=((0, 0), (0, 0)),
        heads=(1, 1),
        context_dim=16,
        linear_projection=False,
        norm_groups=4,
        norm_eps=1e-5,
        sample_size=side,
        pooled_dim=None,
        time_id_dim=None,
        upcast_attention=False,
    )
    return UNet(build_spec(fields))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("epsilon", "epsilon"),
        ("v", "v_prediction"),
        ("v-zero-snr", "v_prediction"),
        ("untrained", None),
    ],
)
def test_what_a_trained_net_predicts(trained: Trained, kind: str, answer: str | None) -> None:
    verdict = probe_prediction(trained.subjects(kind), PLAIN, at_once=16)
    assert verdict.answer == answer, verdict.words


@pytest.mark.parametrize(
    ("kind", "answer"), [("v", False), ("v-zero-snr", True), ("untrained", None)]
)
def test_the_schedule_of_a_trained_net(trained: Trained, kind: str, answer: bool | None) -> None:
    verdict = probe_zero_snr(trained.subjects(kind), PLAIN, RESCALED, at_once=16)
    assert verdict.answer == answer, verdict.words


def ideal(schedule: NoiseSchedule, side: int) -> Predict:
    """The best net there is for `images`, in closed form: all of it is normal."""
    basis = waves(side) / side

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha = schedule.alphas_cumprod[t][:, None, None, None]

        def gain(energy: float) -> Tensor:
            return alpha.sqrt() * energy / (alpha * energy + 1 - alpha)

        slopes = torch.einsum("bchv,whv,wij->bcij", x, basis, basis)
        detail = 0.3**2
        image = gain(detail) * (x - slopes) + gain(0.7**2 * side**2 + detail) * slopes
        if schedule.prediction == "epsilon":
            return (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
        # √ᾱ·ε - √(1-ᾱ)·x_0, of which x_t tells all but x_0
        return (alpha.sqrt() * x - image) / (1 - alpha).sqrt()

    return predict


def asked(predict: Predict, *, side: int = 32, count: int = 16) -> list[Subject]:
    return subjects(predict, images(count, side, torch.Generator().manual_seed(0)))


def schedule_told(predict: Predict) -> bool | None:
    return probe_zero_snr(asked(predict), PLAIN, RESCALED, at_once=64).answer


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_an_ideal_net_predicts(kind: str) -> None:
    verdict = probe_prediction(asked(ideal(SCHEDULES[kind], 32)), PLAIN, at_once=64)
    assert verdict.answer == SCHEDULES[kind].prediction, verdict.words


def test_an_answer_of_the_image_or_of_nothing_is_neither() -> None:
    zeros = probe_prediction(asked(lambda x, t: 0 * x), PLAIN, at_once=4)
    assert zeros.answer is None
    assert zeros.words == "error 1 to epsilon and 1 to v, where zeros have 1"

    def image_of(latent: Tensor) -> Predict:
        return lambda x, t: latent.expand_as(x)

    latents = images(8, 32, torch.Generator().manual_seed(0))
    for scale in (1, -3):  # -3 times the image is at least nearer to v, but worse than zeros
        x_0 = [Subject(latent, image_of(scale * latent)) for latent in latents]
        assert probe_prediction(x_0, PLAIN, at_once=4).answer is None


def test_an_answer_between_the_two_is_neither() -> None:
    nets = [ideal(EPSILON, 32), ideal(PLAIN, 32)]
    between = probe_prediction(
        asked(lambda x, t: torch.stack([net(x, t) for net in nets]).mean(0)), PLAIN, at_once=4
    )
    assert between.answer is None, between.words


def test_the_schedule_of_an_ideal_net() -> None:
    assert schedule_told(ideal(PLAIN, 32)) is False
    assert schedule_told(ideal(RESCALED, 32)) is True


def translated(predict: Predict, source: NoiseSchedule, target: NoiseSchedule) -> Predict:
    """A net that is told timesteps of one schedule and answers as if it were the other's."""

    def answer(x: Tensor, t: Tensor) -> Tensor:
        signal = source.alphas_cumprod[t][:, None]
        return predict(x, (target.alphas_cumprod - signal).abs().argmin(1))

    return answer


def test_with_its_timesteps_translated_a_net_is_taken_for_the_other() -> None:
    assert schedule_told(translated(ideal(PLAIN, 32), RESCALED, PLAIN)) is True
    assert schedule_told(translated(ideal(RESCALED, 32), PLAIN, RESCALED)) is False


def shifted(predict: Predict, by: int) -> Predict:
    return lambda x, t: predict(x, (t + by).clamp(0, 999))


@pytest.mark.parametrize(
    "predict",
    [
        shifted(ideal(PLAIN, 32), -90),  # it does best when it is told far too late a timestep
        shifted(ideal(RESCALED, 32), 150),  # and far too early a one
        lambda x, t: ideal(PLAIN, 32)(x, 0 * t + 800),  # it does not mind what it is told
    ],
    ids=["the-later-the-better", "the-earlier-the-better", "deaf"],
)
def test_a_net_that_does_best_at_neither_schedule_is_of_neither(predict: Predict) -> None:
    assert schedule_told(predict) is None


def test_images_that_differ_too_much_leave_it_unclear() -> None:
    """Images speak for either schedule. One wins on average, the more draws the surer, but an
    image is not more images for being drawn more often."""
    nets = [ideal(PLAIN, 16), ideal(RESCALED, 16)]
    latents = images(16, 16, torch.Generator().manual_seed(0), scale=2)
    mixed = [Subject(latent, nets[n % 2]) for n, latent in enumerate(latents)]
    assert probe_zero_snr(mixed, PLAIN, RESCALED, at_once=64).answer is None


def test_few_images_and_small_batches_do_not_change_the_answer() -> None:
    few = asked(ideal(RESCALED, 32), count=2)
    one, many = (probe_zero_snr(few, PLAIN, RESCALED, at_once=n) for n in (1, 64))
    assert one == many
    assert one.answer is True


def test_images_are_spread_over_all_and_every_draw_has_its_own_noise() -> None:
    seen: list[tuple[int, bytes]] = []

    def watching(number: int) -> Subject:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            seen.append((number, x.numpy().tobytes()))
            return x

        return Subject(torch.full((4, 8, 8), float(number)), predict)

    probe_prediction([watching(n) for n in range(80)], PLAIN, at_once=3)
    assert [number for number, _ in seen] == list(range(0, 80, 10))
    seen.clear()
    probe_prediction([watching(n) for n in range(3)], PLAIN, at_once=3)
    assert [number for number, _ in seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len({x for _, x in seen}) == 8


def test_schedules_that_are_alike_tell_nothing() -> None:
    verdict = probe_zero_snr(asked(lambda x, t: x), RESCALED, RESCALED, at_once=4)
    assert verdict.answer is None
    assert "hardly differ" in verdict.words


@pytest.mark.parametrize("probe", [probe_prediction, partial(probe_zero_snr, rescaled=RESCALED)])
def test_answers_that_are_not_finite_end_the_run(probe: Callable[..., object]) -> None:
    broken = asked(lambda x, t: x / 0)
    with pytest.raises(NonFiniteError, match="not finite") as refused:
        probe(broken, PLAIN, at_once=4)
    assert "train.precision" in (refused.value.hint or "")
