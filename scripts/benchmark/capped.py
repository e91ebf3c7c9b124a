"""`eri` in a process that may take only so much memory of its GPU.

    python -m scripts.benchmark.capped GIB FILE train configs/sdxl.yaml ...

0 GiB is no cap; the most that was reserved is written to the file when it ends, in GiB.
"""

import sys
from pathlib import Path

from eri.cli import main, set_environment


def run() -> None:
    """Set the cap, be `eri`, and tell the peak."""
    set_environment()  # as `eri` does, before PyTorch is imported
    import torch

    cap, peak = float(sys.argv[1]), Path(sys.argv[2])
    sys.argv = ["eri", *sys.argv[3:]]
    if cap and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / whole, 0)
    try:
        main()
    finally:
        if torch.cuda.is_available():
            peak.write_text(str(torch.cuda.max_memory_reserved() / 2**30))


if __name__ == "__main__":
    run()
