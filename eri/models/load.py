"""Build a base model's parts and fill them with the weights that a checkpoint holds.

Classes come from this package and sizes from the checkpoint's config or shapes; nothing in it is
run. Every weight is used exactly once: a missing, an extra or a misshapen tensor is refused before
any is read.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eri.errors import ModelError
from eri.formats.checkpoint import unet_part
from eri.formats.parts import Pieces
from eri.formats.tensors import stream
from eri.models.spec import build_spec
from eri.models.unet import UNet
from eri.printable import first_few, printable

__all__ = ["fill", "load_unet", "require_fit", "require_shapes"]


def load_unet(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet:
    """Build the U-Net of a model and load its weights.

    Args:
        path: a diffusers folder, its `unet` folder, or a safetensors file.
        dtype: of the weights.
        device: of the weights.

    Returns:
        The U-Net, frozen, in evaluation mode.

    Raises:
        ModelError: a model that is not supported, or weights that do not fit it.
        DiskError: it may not be read.
    """
    part = unet_part(Path(path))
    with torch.device("meta"):
        unet = UNet(build_spec(part.fields))
    fill(unet, part.pieces, dtype=dtype, device=device, where=Path(path))
    return unet.requires_grad_(False).eval()


def fill(
    module: nn.Module,
    pieces: Pieces,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    where: Path,
) -> None:
    """Give a module on the meta device its weights, each exactly once.

    Args:
        module: its state dict says what is needed.
        pieces: where each tensor lies, by the module's own names.
        dtype: of the weights.
        device: of the weights.
        where: the model, for errors.

    Raises:
        ModelError: tensors are missing, left over, of another shape, damaged or not finite.
        DiskError: a file may not be read.
    """
    expected = require_fit(module, pieces, where)
    weights = {
        name: tensor.reshape(expected[name])
        for name, tensor in stream(pieces, device=device, dtype=dtype)
    }
    module.load_state_dict(weights, strict=True, assign=True)


def require_fit(module: nn.Module, pieces: Pieces, where: Path) -> dict[str, tuple[int, ...]]:
    """Refuse tensors that are not those of a module.

    Returns:
        The shape of every tensor of the module, by its name.

    Raises:
        ModelError: tensors are missing, left over or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    require_shapes(expected, pieces, where)
    return expected


def require_shapes(expected: Mapping[str, tuple[int, ...]], pieces: Pieces, where: Path) -> None:
    """Refuse tensors that do not have the names and shapes of a module's.

    Raises:
        ModelError: tensors are missing, left over or of another shape.
    """
    problems = [
        *(f"missing: {name} {list(expected[name])}" for name in expected.keys() - pieces.keys()),
        *(
            f"not in this model: {printable(pieces[name].key)}"
            for name in pieces.keys() - expected.keys()
        ),
        *(
            f"wrong shape: {printable(pieces[name].key)} is {list(pieces[name].shape)}, "
            f"expected is {list(expected[name])}"
            for name in expected.keys() & pieces.keys()
            if not _fits(pieces[name].shape, expected[name])
        ),
    ]
    if problems:
        raise ModelError(
            f"{len(problems)} tensors do not fit the model",
            where=printable(where),
            hint="the file may be incomplete or belong to another model; download it again",
            problems=first_few(sorted(problems), str),
        )


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for a 1x1 kernel, which a linear layer may stand for."""
    short, long = sorted((found, expected), key=len)
    return long == short or (len(short) == 2 and long == (*short, 1, 1))
