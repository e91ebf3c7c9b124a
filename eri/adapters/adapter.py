"""An adapter: the LoRA layers that stand in a model in place of its linear layers and convolutions.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from eri.adapters.targets import select
from eri.errors import ModelError
from eri.formats.adapter_file import LoRAPair, read_adapter
from eri.layers import Conv2d, Linear, LoRAConv2d, LoRALinear
from eri.layers.flat import Flat
from eri.layers.lora import Copier
from eri.layers.lora_copies import LoRACopies
from eri.rng import generator

__all__ = ["Adapter", "attach", "layer_shapes", "load_adapter"]


class Adapter:
    """LoRA layers in a model, by the name of the module that each one stands for."""

    def __init__(self, model: nn.Module, layers: Mapping[str, LoRALinear | LoRAConv2d]) -> None:
        self.model = model
        self.layers = dict(layers)
        self._copies: tuple[list[Copier], LoRACopies] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Every down and up matrix, in the model's order: what an optimizer is given."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with their names, `<module>.lora_a.weight` and `<module>.lora_b.weight`."""
        return [
            (f"{name}.{part}.weight", getattr(layer, part).weight)
            for name, layer in self.layers.items()
            for part in ("lora_a", "lora_b")
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The matrices by name, detached: what a checkpoint keeps."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the matrices of `state_dict`.

        Raises:
            ModelError: a name or a shape differs.
        """
        mine = {name: parameter.shape for name, parameter in self.named_parameters()}
        theirs = {name: tensor.shape for name, tensor in state.items()}
        if mine != theirs:
            wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise ModelError(
                f"{len(wrong)} adapter weights differ in name or shape, first {wrong[0]}",
                hint="rank and targets must be those that the checkpoint was trained with",
            )
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
        self.changed()

    def pairs(self) -> dict[str, LoRAPair]:
        """The adapter as the file formats take it."""
        return {
            name: LoRAPair(
                down=layer.lora_a.weight.detach(),
                up=layer.lora_b.weight.detach(),
                alpha=layer.alpha,
            )
            for name, layer in self.layers.items()
        }

    def load_pairs(self, pairs: Mapping[str, LoRAPair]) -> None:
        """Take the matrices of `pairs`.

        Raises:
            ModelError: a module or a shape differs.
        """
        state = {}
        for name, pair in pairs.items():
            state[f"{name}.lora_a.weight"] = pair.down
            state[f"{name}.lora_b.weight"] = pair.up
        self.load_state_dict(state)

    def set_strength(self, strength: float) -> None:
        """Multiply the adapter's effect by a number; 1 is as trained, 0 is the base model."""
        for layer in self.layers.values():
            layer.scale = strength * layer.alpha / layer.rank

    def flatten(self) -> Flat:
        """Move all matrices into one piece of memory, down matrices first.

        Layers that run as one, see `LoRALayer.copied_by`, then have theirs side by side.
        """
        runs: dict[object, list[str]] = {}
        for name, layer in self.layers.items():
            runs.setdefault(layer.copied_by or layer, []).append(name)
        layers = [name for names in runs.values() for name in names]
        matrices = dict(self.named_parameters())
        order = [f"{name}.{part}.weight" for part in ("lora_a", "lora_b") for name in layers]
        flat = Flat({name: matrices[name] for name in order}, self.changed)
        self._copies = None  # from where the matrices were
        self.changed()  # what that needs is made now, not within a step, which may keep nothing
        return flat

    def changed(self) -> None:
        """Have the matrices copied to wherever they are read; see `LoRALayer.copied_by`."""
        copiers = dict.fromkeys(layer.copied_by for layer in self.layers.values())
        readers = [copier for copier in copiers if copier is not None]
        if self._copies is None or self._copies[0] != readers:
            copies = LoRACopies(copy for reader in readers for copy in reader.copies())
            self._copies = readers, copies
        self._copies[1]()

    def detach(self) -> None:
        """Put the base layers back: the model computes what it did before.

        Raises:
            ValueError: the model is arranged in a way that reads the adapter elsewhere, too.
        """
        if any(layer.copied_by is not None for layer in self.layers.values()):
            raise ValueError("Adapter.detach: arrange(model, lean=False) first")
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str = "attn+ff+proj",
    seed: int = 0,
) -> Adapter:
    """Put LoRA layers into a model, in place; afterwards only they train.

    Args:
        model: a U-Net without an adapter.
        rank: r of every layer.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        dropout: probability on each adapter's input.
        targets: groups of modules, see `eri.adapters.targets`.
        seed: of the down matrices; the up matrices start at zero.

    Raises:
        ConfigError: the targets name nothing.
        ValueError: a rank below 1, or a model that has an adapter already.
    """
    _refuse_second(model)
    layers = {
        name: _wrap(base, rank, alpha, dropout, generator(seed, "init", sample=index))
        for index, (name, base) in enumerate(select(model, targets).items())
    }
    return _put(model, layers)


def load_adapter(model: nn.Module, path: str | Path) -> Adapter:
    """Attach an adapter file of any known dialect; every key of it is used, or it is refused.

    Args:
        model: a U-Net without an adapter.
        path: a kohya or diffusers file, or a PEFT file or folder.

    Raises:
        ModelError: the file is damaged, or does not fit this model.
    """
    _refuse_second(model)
    file = read_adapter(Path(path), layer_shapes(model))
    layers = {
        name: _wrap(model.get_submodule(name), pair.rank, pair.alpha, 0.0, None)
        for name, pair in file.pairs.items()
    }
    adapter = _put(model, layers)
    adapter.load_pairs(file.pairs)
    return adapter


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and weight shape of every layer of a model that an adapter file may speak of."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv2d)
    }


def _refuse_second(model: nn.Module) -> None:
    if any(isinstance(module, LoRALinear | LoRAConv2d) for module in model.modules()):
        raise ValueError("this model carries an adapter already: detach it first")


def _wrap(
    base: nn.Module,
    rank: int,
    alpha: float | None,
    dropout: float,
    draws: torch.Generator | None,
) -> LoRALinear | LoRAConv2d:
    if isinstance(base, Linear):
        return LoRALinear.from_linear(base, rank, alpha=alpha, dropout=dropout, generator=draws)
    if isinstance(base, Conv2d):
        return LoRAConv2d.from_conv(base, rank, alpha=alpha, dropout=dropout, generator=draws)
    raise TypeError(f"a {type(base).__name__} cannot carry a LoRA")


def _put(model: nn.Module, layers: Mapping[str, LoRALinear | LoRAConv2d]) -> Adapter:
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    adapter = Adapter(model, layers)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    return adapter
