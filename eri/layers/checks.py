"""Checks that layers share: each refuses a wrong input before any kernel runs, and says which."""

import torch
from torch import Tensor, nn

__all__ = ["check_divides", "check_same_device", "shape_error"]


def shape_error(layer: nn.Module, found: Tensor, expected: str) -> ValueError:
    """The error for an input of the wrong shape: names the layer, what it expects, what it got."""
    name = type(layer).__name__
    return ValueError(f"{name}: expected an input of shape {expected}, found {list(found.shape)}")


def check_divides(layer: nn.Module, divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Refuse a `value` that cannot be cut into `divisor` equal parts.

    Raises:
        ValueError: naming the layer and both numbers.
    """
    if divisor < 1 or value % divisor:
        raise ValueError(
            f"{type(layer).__name__}: {name} = {value} is not divisible "
            f"by {divisor_name} = {divisor}"
        )


def check_same_device(module: nn.Module, *inputs: Tensor) -> torch.device:
    """The one device that holds every parameter and buffer of `module` and every input.

    Seed rows: A134.

    Raises:
        RuntimeError: there are two devices or more; the message names a tensor on each.
        ValueError: there is no tensor at all.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    named += [(f"input {i}", x) for i, x in enumerate(inputs)]
    if not named:
        raise ValueError(f"{type(module).__name__}: no parameter, buffer or input has a device")
    first_name, first = named[0]
    for name, tensor in named:
        if tensor.device != first.device:
            raise RuntimeError(
                f"{type(module).__name__}: {first_name} is on {first.device}, "
                f"but {name} is on {tensor.device}; move all of them to one device"
            )
    return first.device
