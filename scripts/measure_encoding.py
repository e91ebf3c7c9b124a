"""Time what is done once for each image and each caption: VAE and text encoders on a GPU.

    python scripts/measure_encoding.py MODEL [SIDE]

MODEL is anything that `model:` takes; SIDE is in pixels, the model's own unless given. Images are
random numbers. Printed: seconds (median of 10, after one that does not count), the most memory that
PyTorch reserved, and how far TF32 and tiles are from float32, as a share of the latents' deviation.
"""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from eri.run.base import look_at
from eri.run.encoding import tensor_cores

CAPTION = "a cat on a chair, drawn in ink, white background, one thing"


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds and GiB reserved at the peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(11):
        torch.cuda.synchronize()
        began = perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(perf_counter() - began)
    return median(seconds[1:]), torch.cuda.max_memory_reserved() / 2**30


def report(name: str, work: Callable[[], Tensor], truth: Tensor | None = None) -> None:
    """Print a row."""
    seconds, memory = timed(work)
    far = "" if truth is None else f"   {(work() - truth).std() / truth.std():.2e} off"
    print(f"{name:<24} {seconds:8.4f} s {memory:6.2f} GiB{far}")


def main(model: str, side: int | None) -> None:
    """Measure one model."""
    torch.backends.cudnn.allow_tf32 = False
    facts = look_at(model)
    side = side or facts.resolution
    vae = facts.load_vae().to("cuda")
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    truth = vae.encode(image)[0]
    print(f"{facts.name}: {side}x{side} on {torch.cuda.get_device_name()}")
    report("VAE, float32", lambda: vae.encode(image)[0])
    with tensor_cores():
        report("VAE, TF32", lambda: vae.encode(image)[0], truth)
        report("VAE, TF32, in tiles", lambda: vae.encode(image, tiled=True)[0], truth)
    vae.to("cpu")
    text = facts.load_text("cuda")
    report("one caption", lambda: text.encode([CAPTION])[0])
    report("16 captions at once", lambda: text.encode([CAPTION] * 16)[0])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
