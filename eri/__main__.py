"""`python -m eri` is the command `eri`."""

from eri.cli import main

main()
