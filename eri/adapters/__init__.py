"""Adapters: which modules are adapted, and the LoRA layers that are put in their place."""

from eri.adapters.adapter import Adapter, attach, layer_shapes, load_adapter
from eri.adapters.targets import GROUPS

__all__ = ["GROUPS", "Adapter", "attach", "layer_shapes", "load_adapter"]
