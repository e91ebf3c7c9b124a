"""What `scripts/bench` runs: how fast a training step is, and whether its numbers are right."""
