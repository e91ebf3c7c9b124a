"""Names of the autoencoder's tensors: those that older versions of diffusers wrote, and today's."""

import re

__all__ = ["current"]

OLD_ATTENTION = re.compile(
    r"((?:en|de)coder\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)"
)
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current(name: str) -> str:
    """Today's name of a tensor; diffusers before 0.17 named the middle attention's otherwise."""
    match = OLD_ATTENTION.fullmatch(name)
    return name if match is None else f"{match[1]}.{ATTENTION[match[2]]}.{match[3]}"
