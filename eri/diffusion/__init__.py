"""Diffusion itself: the noise schedule, the loss and the samplers; it knows of no model."""

from eri.diffusion.loss import Predict, denoising_loss
from eri.diffusion.samplers import Sampler, sample
from eri.diffusion.schedule import NoiseSchedule, Prediction

__all__ = ["NoiseSchedule", "Predict", "Prediction", "Sampler", "denoising_loss", "sample"]
