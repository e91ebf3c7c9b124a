"""Training here is training as the field means it: step by step the same as diffusers with PEFT."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import GradScaler

from eri.adapters import Adapter, attach
from eri.diffusion import NoiseSchedule
from eri.formats.unet_names import to_diffusers
from eri.models import load_unet
from eri.rng import generator, normal
from eri.run.objective import Objective, Sample, SampleBatch
from eri.train import OPTIMIZERS, TrainState, update

STEPS = 50
SHAPE = (4, 8, 8)
RANK = 4


@dataclass(frozen=True)
class Settings:
    """What both loops are told."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1e-3  # below the norms that occur, so that it always clips
    later: int = 0  # timesteps that the reference is off by


def samples() -> list[Sample]:
    torch.manual_seed(0)
    zeros = torch.zeros(SHAPE)
    return [Sample(str(n), torch.randn(SHAPE), zeros, torch.randn(7, 32)) for n in range(6)]


def numbers_of(step: int) -> range:
    return range(2 * step, 2 * step + 2)


def train_here(folder: Path, settings: Settings) -> dict[str, Tensor]:
    """ΔW of every module after the steps, by its diffusers name."""
    data = samples()
    unet = load_unet(folder)
    adapter = attach(unet, rank=RANK, alpha=RANK / 2)
    parameters = dict(adapter.named_parameters())
    optimizer = OPTIMIZERS["adamw"](parameters.values(), settings.lr, settings.weight_decay)
    state = TrainState(0, parameters, optimizer, GradScaler("cpu", enabled=False))
    loss = Objective(unet, NoiseSchedule(), seed=0, drops=False)
    for step in range(STEPS):
        numbers = numbers_of(step)
        batch = SampleBatch([data[n % len(data)] for n in numbers], numbers)
        update(state, loss, [batch], settings.max_grad_norm)
    return {to_diffusers(name): layer.delta().detach() for name, layer in adapter.layers.items()}


def train_there(folder: Path, settings: Settings) -> dict[str, Tensor]:
    """The same with diffusers' net and noise, PEFT's layers and PyTorch's optimizer."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    data = samples()
    start = attach(load_unet(folder), rank=RANK, alpha=RANK / 2)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    names = [to_diffusers(name) for name in start.layers]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=names))
    layers = {name: unet.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.lora_A.default.weight.data.copy_(_start(start, name))
    noise_schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    for step in range(STEPS):
        chosen = [data[n % len(data)] for n in numbers_of(step)]
        latents = torch.stack([sample.mean for sample in chosen])
        context = torch.stack([sample.context for sample in chosen])
        noise = normal(SHAPE, 0, "noise", samples=numbers_of(step))
        t = torch.stack(list(timesteps(step))) + settings.later
        noisy = noise_schedule.add_noise(latents, noise, t.clamp(0, 999))
        loss = F.mse_loss(unet(noisy, t.clamp(0, 999), context).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def _start(adapter: Adapter, name: str) -> Tensor:
    ours = {to_diffusers(key): layer for key, layer in adapter.layers.items()}
    return ours[name].lora_a.weight


def timesteps(step: int) -> Iterator[Tensor]:
    for number in numbers_of(step):
        yield torch.randint(1000, (), generator=generator(0, "timestep", sample=number))


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative difference of all updates together."""
    assert mine.keys() == theirs.keys()
    between = sum((mine[name] - theirs[name]).double().square().sum() for name in mine)
    size = sum(theirs[name].double().square().sum() for name in mine)
    return float((torch.as_tensor(between) / size).sqrt())


@pytest.fixture(scope="module")
def here(sd15: Path) -> dict[str, Tensor]:
    return train_here(sd15, Settings())


def test_fifty_steps_give_the_updates_of_diffusers_and_peft(
    sd15: Path, here: dict[str, Tensor]
) -> None:
    assert len(here) == 192
    assert all(delta.any() for delta in here.values())
    assert difference(here, train_there(sd15, Settings())) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: replace(settings, weight_decay=0.0),
        lambda settings: replace(settings, max_grad_norm=None),
        lambda settings: replace(settings, later=1),
    ],
    ids=["without weight decay", "without clipping", "a timestep off by one"],
)
def test_the_comparison_notices(
    sd15: Path, here: dict[str, Tensor], change: Callable[[Settings], Settings]
) -> None:
    assert difference(here, train_there(sd15, change(Settings()))) > 1e-4
