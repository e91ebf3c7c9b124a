#!/usr/bin/env python
"""Measure how fast a full-size SDXL U-Net loads, and how much memory of the host that takes.

    python scripts/measure_load.py            # from the root of a clone; needs 12 GB of disk

The U-Net has random weights in bfloat16. Each way of loading runs in a process of its own, three
times in turns, after the file was read once; what is told is the median. The memory is anonymous
memory of the process at its highest, above what it was after the imports and, on a GPU, after CUDA
was started: pages of the mapped file are the system's to take back and do not count.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.full_size import random_unet, save_single_file

LOADERS = ("eri, single file", "eri, folder", "diffusers, folder")
ROUNDS = 3


def anonymous_bytes() -> int:
    """Anonymous memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell RssAnon; Linux does")


class Peak(threading.Thread):
    """Watches the anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.bytes = anonymous_bytes()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())


def measure(loader: str, device: str, folder: Path) -> dict[str, float]:
    """Load once, in this process."""
    from diffusers import UNet2DConditionModel

    from eri.models import load_unet

    torch.zeros(1, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    if loader.startswith("eri"):
        path = folder / "unet.safetensors" if "single" in loader else folder / "unet"
        unet = load_unet(path, dtype=torch.bfloat16, device=device)
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16)
        unet = unet.to(device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak.stopped.set()
    peak.join()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684, "not the whole net"
    return {"seconds": seconds, "bytes": max(peak.bytes, anonymous_bytes()) - peak.start_bytes}


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
        return
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet = random_unet("sdxl", devices[-1])
        save_single_file(unet, folder / "unet.safetensors")
        unet.bfloat16().save_pretrained(folder / "unet", max_shard_size="20GB")
        size = (folder / "unet.safetensors").stat().st_size
        del unet
        print(f"file {size / 1e9:.2f} GB, torch {torch.__version__}")
        print("| loaded by | to | seconds | host memory above the imports |\n|---|---|---|---|")
        for device in devices:
            found: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
            for _ in range(ROUNDS):
                for loader in LOADERS:
                    command = [sys.executable, __file__, loader, device, name]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr)
                    found[loader].append(json.loads(done.stdout.splitlines()[-1]))
            for loader, runs in found.items():
                seconds = median(run["seconds"] for run in runs)
                held = max(run["bytes"] for run in runs) / 1e9
                print(f"| {loader} | {device} | {seconds:.2f} | {held:.2f} GB |")


if __name__ == "__main__":
    main()
