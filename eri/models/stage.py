"""One stage of a U-Net: the documented LoRA block, and with further fields every other stage.

Shapes: B batch, C channels, H W height and width, E time embedding, S context tokens of width K.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers import Conv2d, LoRAAttention, LoRAConv2d, LoRALinear
from eri.layers.frozen_conv import frozen_conv
from eri.models.blocks import ResNetBlock, SpatialTransformer

__all__ = ["LoRAUNetBlock", "UNetConfig"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """What one U-Net stage is made of. The first six fields are the documented ones.

    Seed rows: A142, A145.
    """

    in_channels: int  # C of the stage's input
    out_channels: int  # C after the first resnet
    use_attention: bool  # whether the layers named by `attend` have attention
    attention_heads: int  # heads of each attention; a divisor of out_channels
    lora_rank: int | None  # rank of the adapters on the attentions; None: no adapter
    downsample: bool  # halve H and W at the end with a stride-2 convolution

    lora_alpha: float | None = None  # None: the adapters are scaled by 1
    attend: tuple[bool, ...] = (False, True)  # one entry a layer: attention after its resnet?
    skip_channels: tuple[int, ...] = ()  # C of the skip map that each layer takes (up stages)
    upsample: bool = False  # double H and W at the end, nearest, then a convolution
    # one entry a layer, blocks of its SpatialTransformer; None: one LoRAAttention
    transformer_depth: tuple[int, ...] | None = None
    context_dim: int | None = None  # K of the cross-attention context
    linear_projection: bool = False  # proj_in and proj_out linear (SD2.x, SDXL) or 1x1 (SD1.x)
    temb_channels: int | None = None  # E of the time embedding; None: none
    groups: int = 32  # of every GroupNorm
    eps: float = 1e-5  # of the resnets' GroupNorms

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: sizes that do not go together.
        """
        if self.use_attention and self.out_channels % self.attention_heads:
            raise ValueError(
                f"UNetConfig: out_channels {self.out_channels} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        if self.skip_channels and len(self.skip_channels) != len(self.attend):
            raise ValueError(
                f"UNetConfig: {len(self.skip_channels)} skip_channels for "
                f"{len(self.attend)} layers; one each is needed"
            )
        if self.downsample and self.upsample:
            raise ValueError("UNetConfig: a stage is either downsampled or upsampled, not both")
        if self.transformer_depth is not None and self.context_dim is None:
            raise ValueError("UNetConfig: transformer_depth needs a context_dim")
        if self.transformer_depth is not None and len(self.transformer_depth) != len(self.attend):
            raise ValueError(
                f"UNetConfig: {len(self.transformer_depth)} transformer_depths for "
                f"{len(self.attend)} layers; one each is needed"
            )


class _Layer(nn.Module):
    """A resnet and the attention that follows it, if any."""

    def __init__(self, config: UNetConfig, number: int, in_channels: int) -> None:
        super().__init__()
        self.resnet = ResNetBlock(
            in_channels,
            config.out_channels,
            temb_channels=config.temb_channels,
            groups=config.groups,
            eps=config.eps,
        )
        attends = config.use_attention and config.attend[number]
        self.attention = _attention(config, number) if attends else None

    def forward(self, x: Tensor, temb: Tensor | None, context: Tensor | None) -> Tensor:
        x = self.resnet(x, temb)
        return x if self.attention is None else self.attention(x, context)


def _attention(config: UNetConfig, number: int) -> LoRAAttention | SpatialTransformer:
    if config.transformer_depth is None or config.context_dim is None:
        return LoRAAttention(
            config.out_channels,
            config.attention_heads,
            config.lora_rank,
            alpha=config.lora_alpha,
            context_dim=config.context_dim,
            norm_groups=config.groups,
        )
    return SpatialTransformer(
        config.out_channels,
        config.attention_heads,
        config.transformer_depth[number],
        context_dim=config.context_dim,
        linear_projection=config.linear_projection,
        groups=config.groups,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
    )


class LoRAUNetBlock(nn.Module):
    """A U-Net stage: layers of a resnet and an optional attention, then an optional resample.

    With the six documented fields alone it is the documented block: two resnets, one attention
    after the second, one downsampling convolution. With the further fields of `UNetConfig` it is
    every down, mid and up stage of SD1.5, SD2.x and SDXL.

    With a `lora_rank`, only the adapters train: everything else is frozen. A block with a rank and
    no attention has nothing to train, which whoever attaches or trains it finds out and says.

    Seed rows: A140, A141, A143, A146–A149.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.lean = False  # see `eri.models.arrange`
        self.config = config
        skips = config.skip_channels or (0,) * len(config.attend)
        widths = [config.in_channels] + [config.out_channels] * (len(config.attend) - 1)
        self.layers = nn.ModuleList(
            _Layer(config, number, width + skip)
            for number, (width, skip) in enumerate(zip(widths, skips, strict=True))
        )
        channels = config.out_channels
        self.downsample = Conv2d(channels, channels, 3, 2, 1) if config.downsample else None
        self.upsample = Conv2d(channels, channels, 3, 1, 1) if config.upsample else None
        if config.lora_rank is not None:
            self.requires_grad_(False)
            for parameter in self.trainable_parameters():
                parameter.requires_grad_(True)

    @property
    def resnet1(self) -> ResNetBlock:
        """The first layer's resnet."""
        return self._layer(0).resnet

    @property
    def resnet2(self) -> ResNetBlock:
        """The second layer's resnet."""
        return self._layer(1).resnet

    @property
    def attn(self) -> LoRAAttention | SpatialTransformer | None:
        """The attention after the last layer's resnet, None where there is none."""
        return self._layer(-1).attention

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' matrices, and nothing else."""
        for module in self.modules():
            if isinstance(module, LoRALinear | LoRAConv2d):
                yield from module.lora_a.parameters()
                yield from module.lora_b.parameters()

    def forward(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        context: Tensor | None = None,
        skips: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the stage.

        Args:
            x: `[B, C, H, W]`.
            temb: `[B, E]` where the config has `temb_channels`.
            context: `[B, S, K]` where the config has a `context_dim`.
            skips: the U-Net's stack of skip maps. A stage with `skip_channels` pops one before
                each layer; any other stage that is given the stack pushes what each layer and
                the downsampling made.

        Returns:
            `[B, C', H', W']`; H' and W' are ⌊(H-1)/2⌋+1 after downsampling, 2·H after upsampling.
        """
        pops = bool(self.config.skip_channels)
        for layer in self.layers:
            if pops:
                x = torch.cat([x, _pop(skips)], dim=1)
            x = layer(x, temb, context)
            _push(skips, x, pops)
        if self.downsample is not None:
            x = self._resample(x, self.downsample)
            _push(skips, x, pops)
        if self.upsample is not None:
            x = self._resample(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.upsample)
        return x

    def _resample(self, x: Tensor, conv: Conv2d) -> Tensor:
        return frozen_conv(x, conv) if self.lean else conv(x)

    def _layer(self, index: int) -> _Layer:
        layer = self.layers[index]
        if not isinstance(layer, _Layer):
            raise TypeError(f"layer {index} of the stage is a {type(layer).__name__}")
        return layer


def _pop(skips: list[Tensor] | None) -> Tensor:
    if not skips:
        raise ValueError("this stage takes skip maps: pass `skips` with one for each layer")
    return skips.pop()


def _push(skips: list[Tensor] | None, x: Tensor, pops: bool) -> None:
    if skips is not None and not pops:
        skips.append(x)
