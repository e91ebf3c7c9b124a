"""Measuring what a base model's U-Net predicts, for weights do not tell.

ε or v: at medium noise the two lie far apart. A net that knows one of them well has, where x_0 has
unit variance, an error of (1 - √ᾱ)² + (1 - ᾱ) to the other one: about 1, growing to 2 at the end.
These errors are in units of the target's energy, so that an answer of zeros has 1.

With zero terminal SNR or without: both schedules pass through every signal level ᾱ that the probe
uses, at timesteps a and b. So the net is shown one x_t, with one target, and is told a, b, and a
timestep as far beyond either. What it was trained on it answers best when it is told the truth. The
outer two are asked because a net may just do better the earlier, or the later, it is told that it
is: then the best of the four is no sign of either schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, Predict, Prediction
from eri.errors import NonFiniteError
from eri.rng import normal

__all__ = ["Subject", "Verdict", "probe_prediction", "probe_zero_snr"]

PREDICTION_LEVELS = (0.5, 0.6, 0.7)  # of all timesteps; later v is hard, earlier it is close to ε
PREDICTION_DRAWS = 8
LEAST_RATIO = 2.0
"""The worse error over the better one. Nets that were trained score 3 and more; 2 leaves room for
data that is foreign to the net, and no net can be near both targets."""

SNR_LEVELS = (0.7, 0.8, 0.9)  # where a and b lie apart, and what is told says most of the noise
SNR_PIXELS = 16 * 64 * 64  # of latents, that the answer is averaged over
FEWEST_DRAWS, MOST_DRAWS = 8, 256
STANDARD_ERRORS = 3.0
LEAST_GAIN = 0.01  # of the error; a smaller one is what a net has that hardly minds the timestep
FEWEST_IMAGES = 8  # whose scatter tells a standard error

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Subject:
    """An image that the net is asked about.

    Attributes:
        latent: x_0, `[C, H, W]` on the CPU.
        predict: the net with this image's conditions bound, from and to the CPU.
    """

    latent: Tensor
    predict: Predict


@dataclass(frozen=True)
class Verdict(Generic[Answer]):
    """What was measured.

    Attributes:
        answer: None: not clear.
        words: the two numbers behind it.
    """

    answer: Answer | None
    words: str


@torch.no_grad()
def probe_prediction(
    subjects: Sequence[Subject], schedule: NoiseSchedule, *, at_once: int
) -> Verdict[Prediction]:
    """Whether the net predicts ε or v.

    Clear when one error is at most half of the other, and less than that of an answer of zeros.

    Args:
        subjects: images to ask the net about; some are taken, spread over all.
        schedule: v without zero terminal SNR. A net that has it is told a slightly wrong timestep;
            that is little beside the distance between the targets.
        at_once: samples in a forward pass, at most.

    Raises:
        NonFiniteError: the net's answers are not finite.
    """
    timesteps = torch.tensor([int(level * schedule.timesteps) for level in PREDICTION_LEVELS])
    errors, energies = [], []
    for draw, image in enumerate(_spread(len(subjects), PREDICTION_DRAWS)):
        latents, noise = _repeat(subjects[image].latent, draw, len(timesteps))
        targets = torch.stack([noise, schedule.target(latents, noise, timesteps)])
        x = schedule.add_noise(latents, noise, timesteps)
        said = _ask(subjects[image], x, timesteps, at_once)
        errors.append((said - targets).square().mean((1, 2, 3, 4)))
        energies.append(targets.square().mean((1, 2, 3, 4)))
    epsilon, v = (torch.stack(errors).mean(0) / torch.stack(energies).mean(0)).tolist()
    words = f"error {epsilon:.2g} to epsilon and {v:.2g} to v, where zeros have 1"
    answer: Prediction = "epsilon" if epsilon < v else "v_prediction"
    clear = LEAST_RATIO * min(epsilon, v) < max(epsilon, v) and min(epsilon, v) < 1
    return Verdict(answer if clear else None, words)


@torch.no_grad()
def probe_zero_snr(
    subjects: Sequence[Subject], plain: NoiseSchedule, rescaled: NoiseSchedule, *, at_once: int
) -> Verdict[bool]:
    """Whether a v net was trained on the rescaled schedule, whose last timestep is pure noise.

    Clear when the net errs least where it is told one schedule's timestep, by 3 standard errors and
    1 % less than with its neighbours on both sides.

    Args:
        subjects: images to ask the net about; the smaller they are, the more are taken.
        plain: v, without zero terminal SNR.
        rescaled: the same with it.
        at_once: samples in a forward pass, at most.

    Raises:
        NonFiniteError: the net's answers are not finite.
    """
    levels = _levels(plain, rescaled)
    if not levels:
        return Verdict(None, "the schedules hardly differ")
    pixels = subjects[0].latent[0].numel()
    images = _spread(len(subjects), min(max(SNR_PIXELS // pixels, FEWEST_DRAWS), MOST_DRAWS))
    errors = _by_image(
        torch.stack(
            [_told(subjects[n], draw, levels, plain, at_once) for draw, n in enumerate(images)]
        ),
        images,
    )
    by_plain, by_rescaled = errors.mean(0)[1:3].tolist()
    words = (
        f"error {by_plain:.3g} when told timesteps without it and {by_rescaled:.3g} "
        "when told timesteps with it"
    )
    if _is_least(errors, 1):
        return Verdict(False, words)
    return Verdict(True if _is_least(errors, 2) else None, words)


def _levels(plain: NoiseSchedule, rescaled: NoiseSchedule) -> list[tuple[int, list[int]]]:
    """For each level its timestep in the plain schedule, and the four to tell.

    They are evenly spaced: beyond the plain one, the plain one, the rescaled one, beyond that.
    """
    levels = []
    last = plain.timesteps - 1
    for level in SNR_LEVELS:
        a = int(level * plain.timesteps)
        b = int((rescaled.alphas_cumprod - plain.alphas_cumprod[a]).abs().argmin())
        told = [2 * a - b, a, b, 2 * b - a]
        if a > b and told[0] <= last and told[-1] >= 0:
            levels.append((a, told))
    return levels


def _told(
    subject: Subject,
    draw: int,
    levels: Sequence[tuple[int, list[int]]],
    schedule: NoiseSchedule,
    at_once: int,
) -> Tensor:
    """Mean squared error over the levels for each of the four told timesteps, `[4]`.

    It is not taken relative to the image's own energy: what a net does best on average, it does not
    do best on flat images, and these would count more.
    """
    true = torch.tensor([a for a, told in levels for _ in told])
    latents, noise = _repeat(subject.latent, draw, len(true))
    x = schedule.add_noise(latents, noise, true)
    said = _ask(subject, x, torch.tensor([t for _, told in levels for t in told]), at_once)
    error = (said - schedule.target(latents, noise, true)).square().mean((1, 2, 3))
    return error.reshape(len(levels), -1).mean(0)


def _is_least(errors: Tensor, place: int) -> bool:
    """Whether one column of `[D, 4]` is clearly less than its neighbours, draw by draw."""
    gains = torch.stack([errors[:, place - 1], errors[:, place + 1]]) - errors[:, place]
    noise = gains.std(1) / errors.shape[0] ** 0.5
    least = LEAST_GAIN * errors[:, place].mean()
    return bool((gains.mean(1) > torch.clamp(STANDARD_ERRORS * noise, min=least)).all())


def _spread(count: int, draws: int) -> list[int]:
    """The image of each draw: spread over all, or all in turn where there are fewer than draws."""
    return [draw * count // draws if count > draws else draw % count for draw in range(draws)]


def _by_image(errors: Tensor, images: Sequence[int]) -> Tensor:
    """Errors of draws `[D, 4]` as those of images, where there are enough of them.

    Draws of one image share what is peculiar to it, so their scatter alone would promise too much.
    """
    each = torch.tensor(images)
    if each.unique().numel() < FEWEST_IMAGES:
        return errors
    return torch.stack([errors[each == image].mean(0) for image in each.unique()])


def _repeat(latent: Tensor, draw: int, count: int) -> tuple[Tensor, Tensor]:
    """A latent and the noise of a draw, each `count` times."""
    noise = normal(tuple(latent.shape), 0, "probe", samples=[draw])[0]
    return latent.expand(count, *latent.shape), noise.expand(count, *latent.shape)


def _ask(subject: Subject, x: Tensor, timesteps: Tensor, at_once: int) -> Tensor:
    batches = zip(x.split(at_once), timesteps.split(at_once), strict=True)
    said = torch.cat([subject.predict(*batch).float() for batch in batches])
    if not said.isfinite().all():
        raise NonFiniteError(
            "the base model's answers are not finite",
            hint="train.precision: bf16 or fp32 has room for larger numbers than fp16",
        )
    return said
