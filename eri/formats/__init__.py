"""Files of other programs, in and out: the one place that knows their names."""
