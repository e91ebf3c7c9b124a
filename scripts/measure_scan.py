#!/usr/bin/env python
"""Measure how long it takes to check a folder of images and to choose their shapes.

    python scripts/measure_scan.py            # from the root of a clone; needs 1 GB of disk

The images are 256 x 256 photographs of nothing, saved as JPEG, with a caption of a line each. Each
look runs in a process of its own: the first one decodes everything, the second knows it and hashes
only. Memory is what the process held at its highest above what it held after the imports, and all
of it with them.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from eri.config import DataSource
from eri.data import assign, scan

COUNTS = (1_000, 10_000)
PICTURES = 50  # that differ in more than their number
RESOLUTION, STEP = 512, 64


def make(folder: Path, count: int) -> Path:
    """Smooth colors with a little noise, some 20 kB each; a number makes each a file of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 8, (256, 256, 3))
    pictures = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        values = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC)) + noise
        stream = io.BytesIO()
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        pictures.append(stream.getvalue())
    for number in range(count):
        content = pictures[number % PICTURES] + f"{number}".encode()  # behind the image's end
        (folder / f"{number:06}.jpg").write_bytes(content)
        (folder / f"{number:06}.txt").write_text(f"a photograph of nothing, number {number}")
    return folder


def resident(name: str) -> int:
    """Bytes of memory of this process: "VmRSS", or "VmHWM", the most there were."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {name}; Linux does")


def measure(folder: Path) -> dict[str, float]:
    """Look at a folder once, in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the most begins to be counted here
    before, start = resident("VmRSS"), time.perf_counter()
    sources = [DataSource(path=folder)]
    items = scan(sources).items
    checked = time.perf_counter()
    assign(items, sources, [RESOLUTION], step=STEP)
    done = time.perf_counter()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    above = resident("VmHWM") - before
    return {"scan": checked - start, "assign": done - checked, "above": above, "most": most}


def apart(folder: Path, cache: Path) -> dict[str, float]:
    """Look at a folder once, in a process of its own."""
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | {"ERI_CACHE": str(cache)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    """Print a table of all folders and looks."""
    print("| images | look | scan | assign | memory | process |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as top:
        for count in COUNTS:
            folder = make(Path(top, str(count)), count)
            for look in ("first", "second"):
                told = apart(folder, Path(top, "cache"))
                print(
                    f"| {count:,} | {look} | {told['scan']:.2f} s | {told['assign']:.2f} s "
                    f"| {told['above'] / 1e6:.0f} MB | {told['most'] / 1e6:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
