"""kohya's and OneTrainer's own modules, from a checkout of theirs, in the step of the others.

Of kohya's sd-scripts: its U-Nets and `networks/lora.py`. Of OneTrainer: `LoRAModule` over the U-Net
of diffusers, with its blocks checkpointed and compiled as its set-up does. What these files import
beside that (quantised layers, image tools, settings) is replaced by empty stand-ins.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eri.formats.compvis_unet import from_compvis
from eri.formats.unet_names import to_diffusers
from eri.models.unet import sinusoid
from scripts.benchmark.families import RANK, materialize
from scripts.benchmark.peers import Peer, Predict, diffusers_unet, fill_lora, predict_with
from scripts.benchmark.problem import Inputs, Problem

TIME_ID_WIDTH = 256  # of each size id's sinusoid


def build(name: str, problem: Problem, checkout: Path) -> Peer:
    """A case of another trainer.

    Raises:
        ValueError: the checkout lacks what is needed, or the trainer has no net of this size.
    """
    needed = "networks/lora.py" if name.startswith("kohya") else "modules/module/LoRAModule.py"
    if not (checkout / needed).is_file():
        raise ValueError(f"{checkout} is no checkout for {name}: it has no {needed}")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return _kohya(name, problem) if name.startswith("kohya") else _onetrainer(name, problem)


# -------------------------------------------------------------------------------------- kohya


def _kohya(name: str, problem: Problem) -> Peer:
    if problem.family.tiny:
        raise ValueError("kohya's U-Nets have one size, and it is not tiny")
    _stand_in("library.utils", setup_logging=lambda *_, **__: None)
    _einops()
    unet = _kohya_unet(problem)
    lora = importlib.import_module("networks.lora")
    network = lora.create_network(1.0, RANK, RANK, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    dtype = problem.dtype if name == "kohya-bf16" else torch.float32
    network.to(problem.device, dtype).requires_grad_(True).train()
    if name == "kohya-checkpointed":
        unet.enable_gradient_checkpointing()
        unet.train()
    else:
        unet.eval()
    parameters = {}
    for module in network.unet_loras:
        parameters[f"{module.lora_name}.down"] = module.lora_down.weight
        parameters[f"{module.lora_name}.up"] = module.lora_up.weight
    parameters = _by_diffusers_names(parameters, unet, problem)
    fill_lora(parameters)
    return Peer(problem, _call_kohya(unet, problem), parameters, autocast=True)


def _kohya_unet(problem: Problem) -> Any:
    with torch.device("meta"):
        if problem.family.name == "sdxl":
            module = importlib.import_module("library.sdxl_original_unet")
            unet = module.SdxlUNet2DConditionModel()
        else:
            module = importlib.import_module("library.original_unet")
            unet = module.UNet2DConditionModel(
                sample_size=64, attention_head_dim=8, cross_attention_dim=768
            )
    names = _names_in_diffusers(unet, problem)
    materialize(unet, problem.device, problem.dtype, names.__getitem__)
    unet.set_use_sdpa(True)
    return unet


def _names_in_diffusers(unet: nn.Module, problem: Problem) -> dict[str, str]:
    """diffusers' name of every tensor of kohya's net, by kohya's own."""
    names = list(unet.state_dict())
    if problem.family.name == "sd15":
        return {name: name for name in names}
    return {name: to_diffusers(ours) for name, ours in from_compvis(names).items()}


def _by_diffusers_names(
    parameters: dict[str, nn.Parameter], unet: nn.Module, problem: Problem
) -> dict[str, nn.Parameter]:
    """LoRA matrices by the modules' names in diffusers; kohya's have underscores for dots."""
    modules = {}
    for name, there in _names_in_diffusers(unet, problem).items():
        module = name.rpartition(".")[0].replace(".", "_")
        modules[f"lora_unet_{module}"] = there.rpartition(".")[0]
    renamed = {}
    for name, parameter in parameters.items():
        module, _, part = name.rpartition(".")
        renamed[f"{modules[module]}.{part}"] = parameter
    return renamed


def _call_kohya(unet: Any, problem: Problem) -> Predict:
    def predict(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        context = inputs.context.to(x.dtype)
        if problem.family.name == "sd15":
            return unet(x, t, context).sample
        assert inputs.pooled is not None and inputs.time_ids is not None
        sizes = sinusoid(inputs.time_ids.flatten(), TIME_ID_WIDTH).reshape(len(x), -1)
        vector = torch.cat([inputs.pooled, sizes], dim=1).to(x.dtype)
        if torch.is_grad_enabled():  # reentrant checkpointing needs an input with a gradient
            x = x.requires_grad_(unet.training)
        return unet(x, t, context, vector)

    return predict


def _einops() -> None:
    """einops, or what kohya's two patterns mean without it."""
    try:
        importlib.import_module("einops")
    except ImportError:
        _stand_in("einops", rearrange=_rearrange)


def _rearrange(x: Tensor, pattern: str, h: int) -> Tensor:
    if pattern == "b n (h d) -> b h n d":
        return x.unflatten(-1, (h, -1)).transpose(1, 2)
    if pattern == "b h n d -> b n (h d)":
        return x.transpose(1, 2).flatten(2)
    raise ValueError(f"einops is not installed, and {pattern!r} is not one of kohya's patterns")


# --------------------------------------------------------------------------------- OneTrainer


def _onetrainer(name: str, problem: Problem) -> Peer:
    sys.meta_path.insert(0, _Hollow("modules", ["modules.module.LoRAModule"]))
    shape: Callable[[nn.Module], torch.Size] = lambda layer: layer.weight.shape  # noqa: E731
    quantization = importlib.import_module("modules.util.quantization_util")
    quantization.get_weight_shape = shape  # type: ignore[attr-defined]
    layer_type = importlib.import_module("modules.module.LoRAModule").LoRAModule
    unet = diffusers_unet(problem)
    parameters, layers = {}, []
    for module_name, module in unet.named_modules():
        if ".attentions." not in module_name or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        layer = layer_type(module_name, module, RANK, float(RANK)).to(problem.device)
        layers.append(layer)
        parameters[f"{module_name}.down"] = layer.lora_down.weight
        parameters[f"{module_name}.up"] = layer.lora_up.weight
    for layer in layers:
        layer.hook_to_module()
    fill_lora(parameters)
    unet.train()
    if name != "onetrainer":
        _checkpoint_blocks(unet, compiled=name == "onetrainer-compiled")
    peer = Peer(problem, predict_with(unet), parameters, autocast=True, fused=True)
    peer.compiled = name == "onetrainer-compiled"
    return peer


class _Checkpointed(nn.Module):
    """As OneTrainer's `CheckpointLayer`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.checkpoint = block

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            self.checkpoint, *arguments, use_reentrant=False, **named
        )


def _checkpoint_blocks(unet: Any, *, compiled: bool) -> None:
    """As OneTrainer sets up SDXL: diffusers' own checkpointing, and its transformer blocks'."""
    from diffusers.models.attention import BasicTransformerBlock

    torch._dynamo.config.recompile_limit = 256
    unet.enable_gradient_checkpointing()
    for blocks in [module for module in unet.modules() if isinstance(module, nn.ModuleList)]:
        for place, block in enumerate(blocks):
            if isinstance(block, BasicTransformerBlock):
                blocks[place] = layer = _Checkpointed(block)
                if compiled:
                    layer.compile(fullgraph=True)


# --------------------------------------------------------------------------------- stand-ins


def _stand_in(name: str, **contents: Any) -> None:
    """A module with these contents instead of the one of a name."""
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


class _Hollow(MetaPathFinder, Loader):
    """Answers every import from a package with a module of empty classes, but for some files."""

    def __init__(self, package: str, real: Iterable[str]) -> None:
        self.package = package
        self.real = set(real)

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Claim what is of the package and not real, nor a folder on the way to what is."""
        if name in self.real or not f"{name}.".startswith(f"{self.package}."):
            return None
        if any(path.startswith(f"{name}.") for path in self.real):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has whatever it is asked for."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
