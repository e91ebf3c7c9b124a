"""Normalisation over the batch, with running statistics for evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import shape_error

__all__ = ["BatchNorm2d"]


class BatchNorm2d(nn.BatchNorm2d):
    """Normalise each channel of `[B, C, H, W]` over batch and positions.

    Training uses the batch's mean and biased variance and moves the running statistics by
    new = (1 - momentum) · old + momentum · batch, where the batch's variance is the unbiased one,
    as in PyTorch. Evaluation uses the running statistics, and the batch's when there are none.
    `running_mean` starts at 0, `running_var` at 1, `num_batches_tracked` counts the updates.
    Running statistics are built in float32 at least: a variance easily exceeds float16.

    Source: Ioffe, Szegedy, "Batch Normalization", arXiv 1502.03167.
    Seed rows: A04, A62–A68.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        affine: whether `weight` and `bias`, both `[C]`, exist.
        track_running_stats: whether the running statistics exist.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if self.running_mean is not None and self.running_var is not None:
            statistics = torch.promote_types(self.running_mean.dtype, torch.float32)
            self.running_mean = self.running_mean.to(statistics)
            self.running_var = self.running_var.to(statistics)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`.

        Raises:
            ValueError: the input is not four-dimensional or has another number of channels.
        """
        if input.dim() != 4 or input.shape[1] != self.num_features:
            raise shape_error(self, input, f"[B, {self.num_features}, H, W]")
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if mean is not None and self.affine:  # the kernels want one dtype for all four
            weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        use_batch = self.training or mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(input, mean, var, weight, bias, use_batch, momentum, self.eps)
