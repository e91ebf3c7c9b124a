"""Which modules of a U-Net are adapted: named groups, joined with `+` in a config."""

import re

from torch import nn

from eri.errors import ConfigError
from eri.layers import Conv2d, Linear

__all__ = ["GROUPS", "select"]

GROUPS = {
    "attn": re.compile(r"\.attention(\.blocks\.\d+\.attn[12])?\.to_(q|k|v|out)$"),
    "ff": re.compile(r"\.attention\.blocks\.\d+\.ff\.proj_(in|out)$"),
    "proj": re.compile(r"\.attention\.proj_(in|out)$"),
}
"""Group name to the module names in it: attentions, feed-forwards, and the projections around
the transformer blocks."""


def select(model: nn.Module, targets: str) -> dict[str, Linear | Conv2d]:
    """The linear layers and convolutions that some groups name.

    Args:
        model: a U-Net.
        targets: groups joined with `+`, as in `attn+ff+proj`.

    Returns:
        Module name to module, in the model's order.

    Raises:
        ConfigError: an unknown group, or groups that name nothing in this model.
    """
    names = [name.strip() for name in targets.split("+")]
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise ConfigError(
            f"unknown target group {unknown[0]!r}; allowed: {', '.join(GROUPS)}, joined with +",
            where="adapter.targets",
            hint="attn+ff+proj is what kohya trains by default",
        )
    patterns = [GROUPS[name] for name in names]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv2d) and any(p.search(name) for p in patterns)
    }
    if not found:
        raise ConfigError(
            f"nothing to train: {targets!r} names no layer of this model",
            where="adapter.targets",
            hint="attn+ff+proj fits every U-Net with transformer blocks",
        )
    return found
