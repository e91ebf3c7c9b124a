"""A config written out: as YAML that loads back to it, as a schema, and as what a run hangs on."""

from typing import Any

import yaml

from eri.config.schema import Config
from eri.config.strict_yaml import scalar

__all__ = ["dump_config", "json_schema", "trajectory"]

TEXT_TAG = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which also quotes the texts that YAML 1.2 would read as numbers."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(scalar(text), str) else "'"
        if not text.isprintable():
            style = '"'  # the only style that keeps every kind of line break
        return self.represent_scalar(TEXT_TAG, text, style=style)


_Dumper.add_representer(str, _Dumper.text)


def dump_config(config: Config) -> str:
    """The config as YAML with every setting; `load_config` reads it back to an equal one."""
    content = config.model_dump(mode="json")
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return Config.model_json_schema()


def trajectory(config: Config) -> dict[str, Any]:
    """The settings that change the numbers of a run, by dotted key.

    Where the results go, what is saved and drawn, how many steps are taken, what is measured on and
    what reads ahead are left out: a run may be continued with other ones. So is what only decides
    whether an image can be used: which were used is known.
    """
    content = config.model_dump(mode="json", exclude={"output", "save", "sample"})
    for name in ("steps", "workers"):
        del content["train"][name]
    for source in content["data"]:
        for name in ("validation", "on_bad", "missing_caption", "max_megapixels"):
            del source[name]
    return dict(_flat("", content))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return [(prefix, value)]
    dot = "." if prefix else ""
    return [pair for key, below in items for pair in _flat(f"{prefix}{dot}{key}", below)]
