"""Build a base model's parts from a diffusers folder and fill them with its weights.

Classes come from this package and sizes from the folder's own config; nothing in the folder is run.
Every weight is used exactly once: a missing, an extra or a misshapen tensor is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from eri.errors import ModelError
from eri.formats import diffusers_folder, unet_names
from eri.formats.tensors import load_tensors
from eri.models.spec import build_spec
from eri.models.unet import UNet

__all__ = ["fill", "load_unet", "read_weights"]

SHOWN = 5  # names listed in a message before "and n more"


def load_unet(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet:
    """Build the U-Net of a diffusers folder and load its weights.

    Args:
        path: the model's folder, or its `unet` folder.
        dtype: of the weights.
        device: of the weights.

    Returns:
        The U-Net, frozen, in evaluation mode.

    Raises:
        ModelError: a config that is not supported, or weights that do not fit it.
    """
    folder = diffusers_folder.component(Path(path), "unet")
    with torch.device("meta"):
        unet = UNet(build_spec(diffusers_folder.unet_config(folder)))
    weights = (
        (unet_names.from_diffusers(name), tensor)
        for name, tensor in read_weights(diffusers_folder.weights(folder), device, dtype)
    )
    fill(unet, dict(weights), where=folder)
    return unet.requires_grad_(False).eval()


def read_weights(
    files: Iterable[Path], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some files, on a device and in a dtype."""
    for file in files:
        yield from load_tensors(file, device=device, dtype=dtype).items()


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    """Give a module on the meta device its weights, each exactly once.

    Raises:
        ModelError: tensors are missing, left over, or of another shape.
    """
    expected = module.state_dict()
    problems = [
        *(
            f"missing: {name} {list(expected[name].shape)}"
            for name in expected.keys() - weights.keys()
        ),
        *(f"not in this model: {name}" for name in weights.keys() - expected.keys()),
        *(
            f"wrong shape: {name} is {list(weights[name].shape)}, "
            f"the config says {list(expected[name].shape)}"
            for name in expected.keys() & weights.keys()
            if expected[name].shape != weights[name].shape
        ),
    ]
    if problems:
        problems.sort()
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(f"and {len(problems) - SHOWN} more")
        raise ModelError(
            f"{len(problems)} tensors do not fit the model's config",
            where=where,
            hint="the file may be incomplete or belong to another model; download it again",
            problems=shown,
        )
    module.load_state_dict(weights, strict=True, assign=True)
