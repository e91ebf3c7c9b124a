"""One update of flat parameters: unscale, clip, AdamW, zeroed gradient.

Fused are: the norm of the gradient and all that is decided by it; unscaling and clipping; AdamW;
the zeroes for the next gradient. Each buffer is read and written once, the gradient read twice: 36
bytes a parameter. What changes from step to step is read from a control block on the device, so
that nothing waits for the host and the whole can be captured in a CUDA graph. No sum depends on
timing: equal inputs give equal bits.

    norm = ‖grad‖ / scale
    g    = grad / scale · min(1, max_grad_norm / (norm + 1e-6))
    m    ← m + (1 − β1)(g − m)
    v    ← v + (1 − β2)(g² − v)
    p    ← p − lr · weight_decay · p − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2;
as `torch.optim.AdamW` computes it. Loss scaling: Micikevicius et al., arXiv 1710.03740.

Limits of the kernel: sm_80 or newer; float32 buffers, each contiguous and beginning at a multiple
of 16 bytes. Squares of the gradient over 3e38 count as infinite.

Measured with `pytest -s -m gpu tests/layers/test_adamw.py -k bandwidth`.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, type_name

__all__ = [
    "CONTROL_SIZE",
    "Control",
    "adamw_",
    "adamw_reference",
    "adamw_workspace",
    "unsupported",
]

CONTROL_SIZE = 16
WORKSPACE_BYTES = 16384


class Control(IntEnum):
    """Places of the control block, a float32 `[CONTROL_SIZE]` on the parameters' device.

    The host writes the first four before a step; the update writes the others. `csrc/adamw.h` has
    the same places.
    """

    LR = 0  # learning rate
    SHARE = 1  # 1 / samples of the step; not read here
    STEP = 2  # number of the step, from 1
    LOSS = 3  # of the step
    GRAD_NORM = 4  # before clipping
    SCALE = 5  # of the loss: a power of two, 1 where there is no scaling
    GROWTH = 6  # updates since the scale changed
    UPDATES = 7  # done
    BAD = 8  # the step that was not finite; nothing is updated after it. 0 as long as all is well


@torch.no_grad()
def adamw_reference(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    control: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    growth_interval: int,
) -> None:
    """What `adamw_` is, in PyTorch's own operations; `grad` serves as the only work space."""
    before = control.to(torch.float64, copy=True)
    lr, scale = before[Control.LR], before[Control.SCALE]
    norm = torch.linalg.vector_norm(grad).double() / scale
    update = _decide(control, norm, growth_interval)
    updates = before[Control.UPDATES] + update

    def scalar(value: Tensor | float) -> Tensor:
        """A number of this update; 0 where there is none, which changes nothing."""
        value = value if isinstance(value, Tensor) else torch.full_like(scale, value)
        return torch.where(update, value, 0.0).to(master.dtype)

    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    torch.where(update, grad, grad.new_zeros(()), out=grad)  # NaN · 0 would still be NaN
    grad.mul_(scalar(clip / scale))
    exp_avg.lerp_(grad, scalar(1 - beta1))
    exp_avg_sq.lerp_(grad.square_(), scalar(1 - beta2))
    root = scalar(1 / (1 - beta2**updates).sqrt())
    denominator = torch.sqrt(exp_avg_sq, out=grad).mul_(root).add_(eps)
    change = torch.div(exp_avg, denominator, out=grad).mul_(scalar(lr / (1 - beta1**updates)))
    master.sub_(change.addcmul_(master, scalar(lr * weight_decay)))
    grad.zero_()


def _decide(control: Tensor, norm: Tensor, growth_interval: int) -> Tensor:
    """Whether there is an update; writes what follows from that to the control block."""
    scale, growth, bad = (control[p].clone() for p in (Control.SCALE, Control.GROWTH, Control.BAD))
    usable = control[Control.LOSS].isfinite()
    well = bad == 0
    control[Control.GRAD_NORM] = norm
    update = well & usable & control[Control.GRAD_NORM].isfinite()
    overflow = well & ~update & usable & (scale >= 1) & (growth_interval > 0)
    control[Control.UPDATES] += update
    control[Control.BAD] = torch.where(well & ~update & ~overflow, control[Control.STEP], bad)
    if growth_interval > 0:
        grown = update & (growth + 1 >= growth_interval)
        doubled = torch.where(grown & (scale * 2).isfinite(), scale * 2, scale)
        control[Control.SCALE] = torch.where(overflow, scale / 2, doubled)
        control[Control.GROWTH] = torch.where(grown | overflow, 0.0, growth + update)
    return update


def unsupported(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    control: Tensor,
    workspace: Tensor,
) -> str | None:
    """Why the kernel cannot do this update, in words; None where it can."""
    named = {
        "master": master,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "grad": grad,
        "control": control,
        "workspace": workspace,
    }
    for name, tensor in named.items():
        if name != "workspace" and tensor.dtype != torch.float32:
            return f"{name} is {type_name(tensor.dtype)}, not float32"
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.device != master.device:
            return f"{name} is on {tensor.device}, master on {master.device}"
        if tensor.data_ptr() % VECTOR:
            return f"{name} does not begin at a multiple of {VECTOR} bytes"
    return None


SCHEMA = (
    "adamw_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) grad, "
    "Tensor(e!) control, Tensor(f!) workspace, float beta1, float beta2, "
    "float eps, float weight_decay, float max_grad_norm, int growth_interval) -> ()"
)
LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "adamw_", "CPU")
def _in_order(  # noqa: PLR0917 - the signature of the op
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    control: Tensor,
    workspace: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    growth_interval: int,
) -> None:
    adamw_reference(
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        control=control,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        growth_interval=growth_interval,
    )


@torch.library.register_fake("eri::adamw_", lib=LIBRARY)
def _adamw_fake(*arguments: object) -> None:
    """Returns nothing and changes no shape."""


def adamw_workspace(device: torch.device) -> Tensor:
    """Memory for the kernel's sums, made once for each stream that updates at the same time."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    control: Tensor,
    workspace: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = math.inf,
    growth_interval: int = 0,
) -> None:
    """Update flat parameters in place, once all of a step's gradients are summed; see the module.

    Nothing is updated after a step that was not finite (`Control.BAD`), nor in a step whose
    gradient overflowed while the loss is scaled: that halves the scale. Everything else that is
    not finite makes the step bad. The gradient is zero afterwards in each of these cases.

    Args:
        master: parameters, `[n]`, float32.
        exp_avg: decaying mean of the gradient, `[n]`, float32.
        exp_avg_sq: decaying mean of its square, `[n]`, float32.
        grad: of the step's loss times `Control.SCALE`, `[n]`, float32; zero afterwards.
        control: `[CONTROL_SIZE]`, float32; see `Control`.
        workspace: of `adamw_workspace`.
        betas: decays of the two means.
        eps: added to the root of the mean square; more than 0.
        weight_decay: share of a parameter that a learning rate of 1 takes away.
        max_grad_norm: a gradient of a larger norm is scaled down to it; infinity never does.
        growth_interval: updates after which the loss scale doubles; 0 where nothing is scaled.

    Raises:
        ValueError: a size or a setting that cannot be.
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    buffers = (master, exp_avg, exp_avg_sq, grad)
    _check_sizes(*buffers, control=control, workspace=workspace)
    if not eps > 0 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_: expected 0 <= betas < 1 and eps > 0, found {betas} and {eps}")
    settings = (*betas, eps, weight_decay, max_grad_norm, growth_interval)

    def reason() -> str | None:
        return unsupported(*buffers, control=control, workspace=workspace)

    if use_kernel("adamw_", master.device, reason):
        torch.ops.eri.adamw_(*buffers, control, workspace, *settings)
    else:
        _in_order(*buffers, control, workspace, *settings)


def _check_sizes(master: Tensor, *rows: Tensor, control: Tensor, workspace: Tensor) -> None:
    if master.dim() != 1 or any(row.shape != master.shape for row in rows):
        found = ", ".join(str(list(row.shape)) for row in (master, *rows))
        raise ValueError(f"adamw_: expected rows [n] of one length, found {found}")
    if control.shape != (CONTROL_SIZE,) or workspace.shape != (WORKSPACE_BYTES,):
        raise ValueError(
            f"adamw_: expected a control block [{CONTROL_SIZE}] and a workspace "
            f"[{WORKSPACE_BYTES}], found {list(control.shape)} and {list(workspace.shape)}"
        )
