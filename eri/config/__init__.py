"""The settings of a run: typed, strict, from YAML and `--set`; nothing else parses settings."""

from eri.config.dump import dump_config, json_schema, trajectory
from eri.config.load import load_config, make_config
from eri.config.schema import TARGETS, Adapter, Config, ModelSource, Sample, Save, Train
from eri.config.sources import CaptionRules, DataSource

__all__ = [
    "TARGETS",
    "Adapter",
    "CaptionRules",
    "Config",
    "DataSource",
    "ModelSource",
    "Sample",
    "Save",
    "Train",
    "dump_config",
    "json_schema",
    "load_config",
    "make_config",
    "trajectory",
]
