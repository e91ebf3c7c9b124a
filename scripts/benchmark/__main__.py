"""Measure a training step: how fast it is, and whether its gradients and its losses are right.

  scripts/bench step        samples a second, memory, kernels: eri and other trainers
  scripts/bench gradients   of eri and of diffusers with PEFT, against a float32 reference
  scripts/bench curves      losses of eri and of diffusers with PEFT from the same draws
  scripts/bench kernels     eri's own kernels against the bandwidth of the card
  scripts/bench job         a whole run: where its time goes, and how much memory it takes

`scripts/bench COMMAND --help` tells the options; `--tiny` runs anywhere, to see that it runs.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

from eri.cli import set_environment

COMMANDS = ("step", "gradients", "curves", "kernels", "job")


def main() -> int:
    """Parse, and run the command."""
    set_environment()  # of the processes that are begun, as `eri` has it
    options = parser().parse_args()
    for name in ("kohya", "onetrainer"):
        if getattr(options, name, None) is not None:
            setattr(options, name, str(getattr(options, name).resolve()))
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        "scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        module = import_module(f"scripts.benchmark.{name}")
        first_line = module.__doc__.splitlines()[0]
        one = commands.add_parser(name, description=module.__doc__, help=first_line)
        one.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(one)
        one.add_argument("--tiny", action="store_true", help="a tiny net that runs anywhere")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        one.add_argument("--device", default=device)
        if name in ("step", "gradients"):
            one.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
        one.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
        one.set_defaults(run=module.run)
    return whole


if __name__ == "__main__":
    sys.exit(main())
