"""The emoji as tensors, and varied for the demo model's autoencoder.

The autoencoder must also keep what is no emoji on white, since people train on their own pictures:
it sees emoji of any size, place and colour on any ground.

Shapes: B batch, N emoji; RGBA in 0..1 is [B, 4, 128, 128], RGB is [B, 3, 128, 128].
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def load_pictures(path: Path, device: torch.device) -> tuple[list[str], Tensor]:
    """Names and RGBA pictures [N, 4, 128, 128] in 0..1."""
    with np.load(path) as archive:
        pictures = torch.from_numpy(archive["pictures"]).permute(0, 3, 1, 2)
        return [str(name) for name in archive["names"]], pictures.to(device).float() / 255


def on_white(pictures: Tensor) -> Tensor:
    """RGBA in 0..1 -> RGB in [-1, 1]."""
    alpha = pictures[:, 3:]
    return (pictures[:, :3] * alpha + 1 - alpha) * 2 - 1


def chosen(batch: int, share: float, device: torch.device) -> Tensor:
    """True for about `share` of a batch: [B, 1, 1, 1]."""
    return torch.rand(batch, 1, 1, 1, device=device) < share


def moved(pictures: Tensor) -> Tensor:
    """Random size, turn, place and mirror image of RGBA pictures."""
    batch, device = len(pictures), pictures.device
    angle = torch.randn(batch, device=device) * 0.4
    zoom = torch.exp(torch.empty(batch, device=device).uniform_(-0.4, 0.6))
    mirror = torch.where(torch.rand(batch, device=device) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = torch.randn(2, batch, device=device) * 0.25
    rows = [cos * mirror, -sin, shift[0], sin * mirror, cos, shift[1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [*pictures.shape], False)
    return F.grid_sample(pictures, grid, align_corners=False)


def backgrounds(batch: int, size: int, device: torch.device) -> Tensor:
    """One colour, a gradient, clouds or grain: RGB [B, 3, size, size] in 0..1."""
    scene = torch.rand(batch, 3, 1, 1, device=device).expand(-1, -1, size, size)
    for cells, most in ((2, 0.4), (4, 0.3), (8, 0.2), (24, 0.1)):
        noise = torch.randn(batch, 3, cells, cells, device=device)
        layer = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=True)
        strength = torch.rand(batch, 1, 1, 1, device=device) * most
        scene = scene + layer * strength * chosen(batch, 0.35, device)
    return scene.clamp(0, 1)


def recoloured(images: Tensor) -> Tensor:
    """Random contrast, brightness, mixed channels and, for some, negatives: RGB in 0..1."""
    batch, device = len(images), images.device
    mixing = torch.eye(3, device=device) + torch.randn(batch, 3, 3, device=device) * 0.25
    mixed = torch.einsum("bij,bjhw->bihw", mixing, images - 0.5) + 0.5
    mixed = mixed + torch.randn(batch, 3, 1, 1, device=device) * 0.15
    return torch.where(chosen(batch, 0.2, device), 1 - mixed, mixed).clamp(0, 1)


def varied(pictures: Tensor) -> Tensor:
    """Plain emoji on white for a third, else one or two on any background in any colours."""
    batch, device = len(pictures), pictures.device
    scene = backgrounds(batch, pictures.shape[-1], device)
    second = pictures.roll(1, 0) * chosen(batch, 0.4, device)
    for layer in (moved(second), moved(pictures)):
        scene = scene * (1 - layer[:, 3:]) + layer[:, :3] * layer[:, 3:]
    scene = torch.where(chosen(batch, 0.6, device), recoloured(scene), scene)
    return torch.where(chosen(batch, 0.35, device), on_white(pictures), scene * 2 - 1)
