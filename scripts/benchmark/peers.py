"""diffusers' U-Net with PEFT's LoRA, trained as diffusers' own script does and as fast as can be.

`eager` is the script: a frozen 16-bit base, float32 LoRA, autocast, AdamW of PyTorch as it comes.
`checkpointed` is the same with its gradient checkpointing. `graph` is all that PyTorch offers
without compiling: everything in 16 bit and no autocast, `channels_last`, fused AdamW, and the whole
step as one CUDA graph. `compiled` compiles the resnets and transformer blocks beside that, each as
a whole; `compiled-in-parts` lets the compiler break them where it does not understand them.

Left out of all is what a script does around a step: reading its loss back each time, which would
wait for the GPU, its logging and its data loader.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from torch.amp import GradScaler

from eri.run.micro_batch import SampleBatch
from scripts.benchmark.families import RANK, materialize, random_down, random_up
from scripts.benchmark.problem import (
    LR,
    MAX_GRAD_NORM,
    TIMESTEPS,
    WEIGHT_DECAY,
    Inputs,
    Problem,
    batch_of,
    drawn,
    random_samples,
)

LINEARS = r".*\.attentions\..*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
EAGER_STEPS = 3  # before a graph is captured
SCRIPT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Predict = Callable[[Tensor, Tensor, Inputs], Tensor]
"""A noisy latent, timesteps and the rest of the inputs to the prediction."""


class Peer:
    """A training step made of PyTorch's own parts.

    Args:
        problem: what to train on.
        predict: the net with its LoRA.
        parameters: the LoRA's, by `<module in diffusers>.down` and `.up`.
        autocast: whether the net runs under autocast.
        fused: whether AdamW is PyTorch's fused one; else what it takes by itself.
        lr: of every step.
    """

    def __init__(
        self,
        problem: Problem,
        predict: Predict,
        parameters: Mapping[str, nn.Parameter],
        *,
        autocast: bool,
        fused: bool = False,
        lr: float = LR,
    ) -> None:
        self.problem = problem
        self.predict = predict
        self.parameters = dict(parameters)
        self.autocast = autocast
        self.schedule = DDPMScheduler(**SCRIPT)
        on_gpu = problem.device.type == "cuda"
        kind: dict[str, Any] = {"fused": True, "capturable": on_gpu} if fused else {}
        trained = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY, **kind)
        half = problem.dtype == torch.float16
        self.scaler = GradScaler(problem.device.type, enabled=half)
        self.compiled = False
        self.ring: list[Inputs] = []
        self.steps = 0

    def step(self) -> None:
        """Train on the next batch with noise drawn on the device, as the scripts do."""
        self.update(self._fresh(self._next()))

    eager_step = step

    def train_on(self, batch: SampleBatch) -> float:
        """Train on a batch and wait for its loss."""
        return self.update(drawn(batch, self.problem)).item()

    def update(self, inputs: Inputs) -> Tensor:
        """Train on a batch; the loss, not read back."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(inputs)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def loss(self, inputs: Inputs) -> Tensor:
        """The mean squared error of a batch."""
        noisy = self.schedule.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
        with self._autocast():
            prediction = self.predict(noisy.to(self.problem.dtype), inputs.timesteps, inputs)
        return F.mse_loss(prediction.float(), inputs.noise.float())

    @torch.no_grad()
    def prediction(self, batch: SampleBatch) -> Tensor:
        """What the net says of a batch."""
        inputs = drawn(batch, self.problem)
        noisy = self.schedule.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
        with self._autocast():
            return self.predict(noisy.to(self.problem.dtype), inputs.timesteps, inputs).float()

    def gradients(self, batch: SampleBatch, scale: float = 1.0) -> dict[str, Tensor]:
        """The gradient of each matrix, float32 on the CPU; `scale` as of a loss scaler."""
        self.optimizer.zero_grad(set_to_none=True)
        (scale * self.loss(drawn(batch, self.problem))).backward()
        pairs = self.parameters.items()
        found = {name: p.grad.float().div_(scale).cpu() for name, p in pairs if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def matrices(self) -> dict[str, Tensor]:
        """The LoRA, float32 on the CPU."""
        return {name: p.detach().float().cpu() for name, p in self.parameters.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.autocast or self.problem.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.problem.device.type, self.problem.dtype)

    def _next(self) -> Inputs:
        problem = self.problem
        if not self.ring:
            samples = random_samples(problem.family, problem.side)
            self.ring = [drawn(batch_of(samples, n, problem.batch), problem) for n in range(4)]
        self.steps += 1
        return self.ring[self.steps % len(self.ring)]

    def _fresh(self, inputs: Inputs) -> Inputs:
        noise = torch.randn_like(inputs.latents)
        timesteps = torch.randint(TIMESTEPS, (len(noise),), device=noise.device)
        told = inputs.context, inputs.pooled, inputs.time_ids
        return Inputs(inputs.latents, noise, timesteps, *told)


class GraphedPeer(Peer):
    """The same step, from the fourth on a CUDA graph; on the CPU it stays as it is."""

    graph: Any = None

    def step(self) -> None:
        """Train on the next batch."""
        fresh = self._next()
        if self.problem.device.type != "cuda":
            self.update(self._fresh(fresh))
            return
        if self.steps == 1:
            self.static = Inputs(*(None if t is None else t.clone() for t in vars(fresh).values()))
            self.stream = torch.cuda.Stream()
        for here, new in zip(vars(self.static).values(), vars(fresh).values(), strict=True):
            if here is not None:
                here.copy_(new)
        if self.steps <= EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.update(self._fresh(self.static))
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self._capture()
        self.graph.replay()

    def _capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own memory holds them
        gc.collect()
        torch.cuda.empty_cache()  # what the eager steps took is not the graph's
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.update(self._fresh(self.static))


def diffusers_unet(problem: Problem) -> Any:
    """The U-Net, frozen."""
    logging.set_verbosity_error()  # it warns of every change of type
    family = problem.family
    if family.folder is not None:
        unet: Any = UNet2DConditionModel.from_pretrained(family.folder / "unet")
        return unet.to(problem.device, problem.dtype).requires_grad_(False)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.config)
    return materialize(unet, problem.device, problem.dtype)


def predict_with(unet: Any) -> Predict:
    """How diffusers' U-Net is called."""

    def predict(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        added = None
        if inputs.pooled is not None:
            added = {"text_embeds": inputs.pooled.to(x.dtype), "time_ids": inputs.time_ids}
        context = inputs.context.to(x.dtype)
        return unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]

    return predict


def add_peft(unet: Any, dtype: torch.dtype, *, fresh: bool = False) -> dict[str, nn.Parameter]:
    """Put PEFT's LoRA on all linear layers of the transformers, with its random matrices."""
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, init_lora_weights=False)
    unet.add_adapter(config)
    parameters = {}
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for part, matrices in (("down", layer.lora_A), ("up", layer.lora_B)):
            matrices.default.to(dtype)
            parameters[f"{name}.{part}"] = matrices.default.weight
    fill_lora(parameters, fresh=fresh)
    return parameters


@torch.no_grad()
def fill_lora(parameters: Mapping[str, nn.Parameter], *, fresh: bool = False) -> None:
    """Give LoRA matrices, by name, the numbers of every case; fresh up matrices are zero."""
    for name, parameter in parameters.items():
        module, _, part = name.rpartition(".")
        draw = random_down if part == "down" else random_up
        if part == "up" and fresh:
            parameter.zero_()
        else:
            parameter.copy_(draw(module, tuple(parameter.shape), parameter.device))
        parameter.requires_grad_(True)


def eager(
    problem: Problem, *, checkpointed: bool = False, lr: float = LR, fresh: bool = False
) -> Peer:
    """As diffusers' script trains; `fresh`: from up matrices of zero."""
    unet = diffusers_unet(problem)
    parameters = add_peft(unet, torch.float32, fresh=fresh)
    unet.train()
    if checkpointed:
        unet.enable_gradient_checkpointing()
    return Peer(problem, predict_with(unet), parameters, autocast=True, lr=lr)


def graph(problem: Problem, *, compiled: bool = False, whole: bool = True) -> Peer:
    """As fast as PyTorch goes, with or without its compiler; `whole`: no block may break apart."""
    unet = diffusers_unet(problem).to(memory_format=torch.channels_last)
    parameters = add_peft(unet, problem.dtype)
    unet.train()
    if compiled:
        compile_blocks(unet, whole=whole)
    # a loss scaler reads its verdict back, which a graph cannot
    peer = GraphedPeer(problem, predict_with(unet), parameters, autocast=False, fused=True)
    peer.scaler = GradScaler(problem.device.type, enabled=False)
    peer.compiled = compiled
    return peer


def compile_blocks(unet: Any, *, whole: bool) -> None:
    """Regional compilation: the resnets and the transformer blocks, each kind once a shape."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    torch._dynamo.config.recompile_limit = 256  # a kind of block has up to twelve shapes
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(fullgraph=whole, dynamic=False)
