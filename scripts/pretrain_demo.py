"""Makes the demo base model: a small latent diffusion model that draws emoji by their names.

    python scripts/emoji_pictures.py emoji.npz                  # any machine with the font
    python scripts/pretrain_demo.py vae emoji.npz work/         # 6 minutes on one H200
    python scripts/pretrain_demo.py unet emoji.npz work/        # 9 minutes on one H200
    python scripts/pretrain_demo.py evaluate emoji.npz work/    # 1 minute on one H200

The pictures are the emoji of Noto Color Emoji, the captions their Unicode names. The result,
work/model, is what is shipped as eri/demo/model.

Shapes: B batch, N emoji, images [B, 3, 128, 128] in [-1, 1], latents [B, 4, 16, 16].
"""

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import typer
from demo_parts import (
    new_schedule,
    new_text_encoder,
    new_unet,
    new_vae,
    save_autoencoder,
    save_index,
    save_text_encoder,
    save_unet,
    train_tokenizer,
    write_json,
)
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from emoji_pictures import SIZE
from emoji_tensors import load_pictures, on_white, varied
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

SEED = 0
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5
EMPTY_CAPTIONS = 0.1  # what guidance is relative to
MAX_LOSS_WEIGHT = 20.0
AVERAGED_STEPS = 1000
CAPTIONS_PER_EMOJI = 8  # half of them the bare name, half with a style that is not in the picture
STYLES = (
    "oil ink chalk neon pixel paper glass wood stone clay wool metal silver marble ice copper "
    "soft bold flat round old new dark bright small big simple fine rough painted drawn carved "
    "printed knitted folded shiny dusty warm cold pastel"
).split()
# Words that captions often have, so that they become few tokens; the names have few of them.
EVERYDAY = "a an the of in on with and photo picture style gold golden relief deep blue".split()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def compute_device() -> torch.device:
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_type(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


# One step, repeated


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph; as it is on the CPU."""
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def minimise(
    loss_of: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    save: Callable[[Sequence[nn.Module]], None],
    *,
    steps: int,
    peak_lr: float,
) -> None:
    """Train the modules and save their moving averages, at the end and every 5000 steps.

    AdamW, warm-up then a cosine to zero, gradients clipped to norm 1. The modules compute in
    their own type, the weights that learn are fp32.
    """
    device = next(modules[0].parameters()).device
    averages = [copy.deepcopy(module).float().requires_grad_(False) for module in modules]
    kept = [p for module in averages for p in module.parameters()]
    live = [p for module in modules for p in module.parameters()]
    masters = [p.clone() for p in kept]
    for master in masters:
        master.grad = torch.zeros_like(master)
    lr = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        masters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=on_gpu
    )
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step() -> Tensor:
        with torch.no_grad():
            torch._foreach_copy_(live, masters)
        loss = loss_of()
        gradients = torch.autograd.grad(scaler.scale(loss), live)
        torch._foreach_copy_([master.grad for master in masters], gradients)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    repeat, began, total = captured(step), time.perf_counter(), torch.zeros((), device=device)
    for done in range(1, steps + 1):
        lr.fill_(peak_lr * min(done / 500, 0.5 + 0.5 * math.cos(math.pi * done / steps)))
        total += repeat()
        if done % 10 == 0:
            torch._foreach_lerp_(kept, masters, max(10 / done, 10 / AVERAGED_STEPS))
        if done % 500 == 0:
            seconds = time.perf_counter() - began
            print(f"step {done}, loss {total.item() / 500:.5f}, {seconds:.0f} s", flush=True)
            total.zero_()
        if done % 5000 == 0 or done == steps:
            save(averages)


# The autoencoder


def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the pixels, and of the differences between neighbours."""
    error = image.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


def divergence(posterior: DiagonalGaussianDistribution) -> Tensor:
    """Mean Kullback-Leibler divergence of one latent from the standard normal distribution."""
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a mean of 0 and a variance of 1 per latent channel over `images` into the 1x1 convs.

    Noise of unit variance is where sampling begins, so the latents should be centred on it too:
    otherwise the white of the background is an offset that few steps have to undo.
    """
    latents = encode(vae, images)[0]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward = vae.quant_conv, vae.post_quant_conv
    outward.bias += torch.einsum("oi,i->o", outward.weight[:, :, 0, 0], mean)
    outward.weight *= std.view(1, -1, 1, 1)
    scale = torch.cat([std, torch.ones_like(std)])  # the second half is the log-variance
    inward.weight /= scale.view(-1, 1, 1, 1)
    inward.bias -= torch.cat([mean, 2 * std.log()])
    inward.bias /= scale


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images."""
    posteriors = [vae.encode(part).latent_dist for part in images.split(100)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean absolute error in [-1, 1]."""
    errors = [(vae(part).sample - part).abs().mean() for part in images.split(100)]
    return torch.stack(errors).mean().item()


@app.command()
def vae(archive: Path, work: Path, steps: int = 10000, batch: int = 48) -> None:
    """Train the autoencoder; writes WORK/vae.pt, in fp32."""
    device = compute_device()
    _, pictures = load_pictures(archive, device)
    model = new_vae().to(device, compute_type(device))

    def loss_of() -> Tensor:
        target = varied(pictures[torch.randint(len(pictures), (batch,), device=device)])
        posterior = model.encode(target.to(model.dtype)).latent_dist
        image = model.decode(posterior.sample()).sample
        return reconstruction_loss(image, target) + KL_WEIGHT * divergence(posterior)

    def save(averages: Sequence[nn.Module]) -> None:
        (average,) = averages
        best = copy.deepcopy(average)
        with torch.no_grad():
            standardise(best, on_white(pictures))
        torch.save(best.state_dict(), work / "vae.pt")
        report_autoencoder(best, pictures, work)

    work.mkdir(parents=True, exist_ok=True)
    minimise(loss_of, [model], save, steps=steps, peak_lr=1e-3)


def report_autoencoder(model: AutoencoderKL, pictures: Tensor, work: Path) -> None:
    """Print the errors and draw pictures above their reconstructions."""
    plain, free = on_white(pictures), varied(pictures)
    spread = encode(model, plain)[1].mean().item()
    errors = [reconstruction_error(model, images) for images in (plain, free)]
    print(f"L1 plain {errors[0]:.4f}, varied {errors[1]:.4f}, posterior std {spread:.4f}")
    some = torch.cat([plain[-8:], free[:24]])
    with torch.no_grad():
        rebuilt = model(some).sample
    pairs = torch.stack([some.view(4, 8, *some.shape[1:]), rebuilt.view(4, 8, *some.shape[1:])], 1)
    save_sheet(pairs.flatten(0, 2), 8, work / "vae.png")


def save_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Images side by side in rows, as a PNG."""
    rows = images.unflatten(0, (-1, columns)).clamp(-1, 1).mul(127.5).add(127.5).byte().cpu()
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(sheet.numpy()).save(path, optimize=True)


# The UNet and the text encoder


def caption_table(names: Sequence[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids [N, CAPTIONS_PER_EMOJI, 77]: the name, or the name and a style to be ignored."""
    draw = random.Random(SEED)

    def styled(name: str) -> str:
        return f"{name}, {' '.join(draw.sample(STYLES, draw.randint(1, 2)))} style"

    half = CAPTIONS_PER_EMOJI // 2
    captions = [[name] * half + [styled(name) for _ in range(half)] for name in names]
    return torch.stack([token_ids(of_one, tokenizer) for of_one in captions])


def token_ids(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids [B, 77]."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids


@app.command()
def unet(archive: Path, work: Path, steps: int = 10000, batch: int = 512) -> None:
    """Train the UNet and the text encoder together; writes WORK/model."""
    device = compute_device()
    names, pictures = load_pictures(archive, device)
    autoencoder = new_vae().to(device)
    weights = torch.load(work / "vae.pt", map_location=device, weights_only=True)
    autoencoder.load_state_dict(weights)
    mean, std = encode(autoencoder, on_white(pictures))
    folder = work / "model"
    corpus = names + [word for word in (*STYLES, *EVERYDAY) for _ in range(8)]
    tokenizer = train_tokenizer(corpus, folder / "tokenizer")
    captions = caption_table(names, tokenizer).to(device)
    empty = token_ids([""], tokenizer).to(device)
    model = new_unet().to(device, compute_type(device))
    text = new_text_encoder(tokenizer).to(device, compute_type(device))
    kept = new_schedule().alphas_cumprod.to(device)
    weights = (1 / kept).clamp(max=MAX_LOSS_WEIGHT)  # epsilon's error as v-prediction weighs it
    weights = weights / weights.mean()

    def loss_of() -> Tensor:
        which = torch.randint(len(names), (batch,), device=device)
        wording = torch.randint(CAPTIONS_PER_EMOJI, (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < EMPTY_CAPTIONS
        context = text(torch.where(dropped, empty, captions[which, wording])).last_hidden_state
        latents = mean[which] + std[which] * torch.randn_like(mean[which])
        times = torch.randint(len(kept), (batch,), device=device)
        noise = torch.randn_like(latents)
        signal = kept[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        error = model(noisy.to(model.dtype), times, context).sample.float() - noise
        return (error.square().mean((1, 2, 3)) * weights[times]).mean()

    def save(averages: Sequence[nn.Module]) -> None:
        save_unet(averages[0], folder / "unet")
        save_text_encoder(averages[1], folder / "text_encoder")

    save_autoencoder(autoencoder, folder / "vae")
    save_index(folder)
    minimise(loss_of, [model, text], save, steps=steps, peak_lr=1e-3)


# Does it draw what it is asked for?


@torch.no_grad()
def draw(folder: Path, prompts: Sequence[str], guidance: float, device: torch.device) -> Tensor:
    """Images of prompts: DPM++ 2M Karras in 25 steps from fixed noise, fp32."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device)
    model = UNet2DConditionModel.from_pretrained(folder / "unet").to(device)
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    context = text(token_ids([*prompts, *[""] * len(prompts)], tokenizer).to(device))[0]
    sampler = DPMSolverMultistepScheduler.from_pretrained(
        folder / "scheduler", use_karras_sigmas=True
    )
    sampler.set_timesteps(25, device=device)
    noise = torch.Generator().manual_seed(SEED)
    latents = torch.randn(len(prompts), 4, SIZE // 8, SIZE // 8, generator=noise).to(device)
    for moment in sampler.timesteps:
        asked, free = model(latents.repeat(2, 1, 1, 1), moment, context).sample.chunk(2)
        latents = sampler.step(free + guidance * (asked - free), moment, latents).prev_sample
    parts = [autoencoder.decode(part).sample for part in latents.split(100)]
    return torch.cat(parts).clamp(-1, 1)


def nearest(images: Tensor, known: Tensor) -> Tensor:
    """For each image the index of the known one at the least distance of 32x32 pixels."""
    small, small_known = (F.adaptive_avg_pool2d(x, 32).flatten(1) for x in (images, known))
    return torch.cdist(small, small_known).argmin(1)


@app.command()
def evaluate(archive: Path, work: Path, count: int = 100) -> None:
    """Draw COUNT names; writes WORK/evaluation.json and a contact sheet, asked above drawn."""
    device = compute_device()
    names, pictures = load_pictures(archive, device)
    known = on_white(pictures)
    which = torch.tensor(random.Random(SEED).sample(range(len(names)), count), device=device)
    report: dict[str, object] = {"names": count}
    for guidance in (1.0, 3.0, 5.0, 7.5):
        images = draw(work / "model", [names[i] for i in which], guidance, device)
        found = nearest(images, known)
        wrong = [f"{names[a]} -> {names[b]}" for a, b in zip(which, found, strict=True) if a != b]
        report[f"guidance {guidance}"] = {"right": count - len(wrong), "wrong": wrong}
        print(f"guidance {guidance}: {count - len(wrong)} of {count}; wrong: {wrong}", flush=True)
        pairs = torch.stack([known[which].unflatten(0, (-1, 20)), images.unflatten(0, (-1, 20))], 1)
        save_sheet(pairs.flatten(0, 2), 20, work / f"guidance-{guidance}.png")
    write_json(work / "evaluation.json", report)


if __name__ == "__main__":
    app()
