"""A config written out: as YAML that loads back to it, as a schema, and as what a run hangs on."""

import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from eri.config.schema import Config
from eri.config.section import Section
from eri.config.strict_yaml import scalar

__all__ = ["dump_config", "json_schema", "trajectory"]

TEXT_TAG = "tag:yaml.org,2002:str"
WIDTH = 100
INDENT = "  "


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


def dump_config(config: Config, *, only: Collection[str] | None = None) -> str:
    """The config as YAML, each setting below what it means; `load_config` reads it back.

    Args:
        config: the settings.
        only: dotted keys of the settings that are written; all of them unless said, and then what
            is read back is equal to `config`.
    """
    return "".join(f"{line}\n" for line in _settings(config, "", only))


def _settings(
    section: Section, prefix: str, only: Collection[str] | None, *, told: bool = True
) -> Iterator[str]:
    """The lines of some settings, with what they mean unless that was told already."""
    content = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        key = f"{prefix}{name}"
        if not _is_written(key, only):
            continue
        if not prefix and name != "model":
            yield ""  # between the groups
        if told:
            yield from textwrap.wrap(
                field.description or key, WIDTH, initial_indent="# ", subsequent_indent="# "
            )
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{name}:"
            below = _settings(value, f"{key}.", only, told=told)
            yield from (f"{INDENT}{line}" for line in below)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield f"{name}:"
            for number, part in enumerate(value):
                yield from _list_item(_settings(part, f"{key}.", only, told=told and number == 0))
        else:
            yield from _written({name: content[name]})


def _is_written(key: str, only: Collection[str] | None) -> bool:
    return only is None or any(f"{wanted}.".startswith(f"{key}.") for wanted in only)


def _list_item(lines: Iterator[str]) -> Iterator[str]:
    """A mapping as an item of a list: the dash stands before its first key."""
    dash = "- "
    for line in lines:
        if dash == "- " and line.startswith("#"):
            yield line  # a line with nothing but a dash would be odd to read
        else:
            yield f"{dash}{line}"
            dash = INDENT


def _written(content: dict[str, Any]) -> list[str]:
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    return text.removesuffix("\n").split("\n")  # other line breaks are escaped in quoted texts


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return Config.model_json_schema()


def trajectory(config: Config) -> dict[str, Any]:
    """The settings that change the numbers of a run, by dotted key.

    Where the results go, what is saved and drawn, how many steps are taken, what is measured on,
    what reads ahead and what memory is taken are left out: a run may be continued with other ones.
    So is what only decides
    whether an image can be used, or what it is laid on: which images were used is known, and how
    they look. Numbers that go with a setting are left out where that is off.
    """
    content = config.model_dump(mode="json", exclude={"output", "save", "sample"})
    for name in ("steps", "workers", "memory"):
        del content["train"][name]
    for source, written in zip(config.data, content["data"], strict=True):
        for name in ("validation", "on_bad", "missing_caption", "max_megapixels", "background"):
            del written[name]
        if not source.varies:
            del written["variants"]
        if source.mask == "none":
            del written["unmasked_weight"]
        if not source.caption.varies:
            del written["caption"]["variants"]
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
