"""From a YAML file and `--set` to a `Config`, or to all of its problems at once."""

import logging
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eri.config.problems import schema_problems
from eri.config.schema import Config
from eri.config.strict_yaml import Document, KeyPath, Problem, parse
from eri.errors import ConfigError
from eri.printable import first_few, printable

__all__ = ["load_config", "make_config"]

MAX_BYTES = 1_000_000
PROBLEMS_SHOWN = 100
PROMPT_SETTINGS = (("sample", "prompts"), ("sample", "negative"))
EXAMPLE_HINT = "the smallest config has two lines: `model: demo` and `data: photos/`"

SHORT_FORMS: dict[str, Callable[[str], object]] = {
    "model": lambda path: {"path": path},
    "data": lambda path: [{"path": path}],
}
"""What a text stands for where a group of settings may be."""

log = logging.getLogger(__name__)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a config.

    Args:
        path: a YAML file.
        overrides: changes as `key.path=value`, the value in YAML; the later of two holds.

    Returns:
        The settings, every one with its value.

    Raises:
        ConfigError: the file cannot be read, or settings cannot be used; all of them are named,
            each with its line or its `--set`.
    """
    name = printable(path)
    document = parse(_read(Path(path), name), lambda line, column: f"{name}:{line}:{column}")
    if not isinstance(document.value, dict):
        raise _not_a_mapping(document.value, document.place(()))
    document.places[()] = name
    return _checked(document, document.value, name, overrides)


def make_config(
    *, model: str, data: Sequence[str], output: str | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Checks a config that was given on the command line: what a file of these keys would mean.

    Args:
        model: as the setting.
        data: folders of images, at least one.
        output: as the setting; derived unless said.
        overrides: as for `load_config`.

    Raises:
        ConfigError: settings cannot be used; all of them are named, each with its option.
    """
    settings: dict[str, object] = {"model": model}
    settings["data"] = data[0] if len(data) == 1 else [{"path": folder} for folder in data]
    if output is not None:
        settings["output"] = output
    places: dict[KeyPath, str] = {(): "the command line"}
    places |= {(key,): f"--{key}" for key in settings}
    document = Document(value=settings, places=places)
    return _checked(document, settings, "the command line", overrides)


def _checked(
    document: Document, settings: dict[str, object], name: str, overrides: Sequence[str]
) -> Config:
    for override in overrides:
        _override(document, settings, override)
    _warn_of_comments(document)
    config, problems = None, {}
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        problems = schema_problems(error, document)
    if config is None or document.problems:
        raise _refusal(name, document, problems | document.problems)
    return config


def _read(path: Path, name: str) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise ConfigError(f"the config is {kind}", where=name, hint="name a YAML file")
        if found.st_size > MAX_BYTES:
            what = f"the config has {found.st_size} bytes; at most {MAX_BYTES} are allowed"
            raise ConfigError(what, where=name, hint="is this the right file?")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} is not UTF-8"
        raise ConfigError(what, where=f"{name}:{line}", hint="save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"the config cannot be read: {reason}"
        raise ConfigError(what, where=name, hint="check the path") from error


def _not_a_mapping(value: object, where: str) -> ConfigError:
    if value is None:
        return ConfigError("the config is empty", where=where, hint=EXAMPLE_HINT)
    if isinstance(value, str) and ":" in value:
        hint = "write a space after each colon, as in `lr: 1e-4`"
        return ConfigError(
            f"expected `key: value`, found '{printable(value)}'", where=where, hint=hint
        )
    what = f"expected a mapping of keys, found {type(value).__name__}"
    return ConfigError(what, where=where, hint=EXAMPLE_HINT)


def _override(document: Document, settings: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    if not key or not equals:
        what = f"'{printable(override)}' is not key.path=value"
        raise ConfigError(what, where="--set", hint="as in --set train.lr=1e-4")
    where = f"--set {printable(key)}"
    changed = parse(text, lambda line, column: where)
    named: KeyPath = tuple(key.split("."))
    try:
        path = _put(settings, named, changed.value)
    except ConfigError as error:
        document.places[named] = where
        document.problems[named] = Problem(where=where, what=error.what, hint=error.hint)
        return
    for table in (document.places, document.problems):
        for below in [known for known in table if known[: len(path)] == path]:
            del table[below]
    document.commented = [known for known in document.commented if known[: len(path)] != path]
    for length in range(1, len(path)):
        document.places.setdefault(path[:length], where)
    document.places |= {path + below: where for below in changed.places}
    document.problems |= {path + below: problem for below, problem in changed.problems.items()}
    document.commented += [path + below for below in changed.commented]


def _put(settings: dict[str, object], path: KeyPath, value: object) -> KeyPath:
    """Set a value, below short forms and in lists as well; the path that it then has.

    Raises:
        ConfigError: there is no such place.
    """
    group: Any = settings
    reached: KeyPath = ()
    for number in range(len(path)):
        *items, key = _steps(group, reached, path[number:])
        for item in items:
            group = group[item]
        reached = (*reached, *items, key)
        if number == len(path) - 1:
            group[key] = value
        else:
            group = _group_below(group, key)
    return reached


def _steps(group: object, reached: KeyPath, rest: KeyPath) -> KeyPath:
    """Where the first key of the rest leads: into a mapping, or a list, by its index.

    The index of an only item goes without saying.
    """
    name, key = _dotted(*reached, *rest), str(rest[0])
    if isinstance(group, dict):
        return (key,)
    if not isinstance(group, list):
        what = f"{name} stands below a value that is not a mapping"
        raise ConfigError(what, hint="set the whole value")
    indices = {str(index): index for index in range(len(group))}
    if key in indices:
        return (indices[key],)
    if len(group) == 1 and not key.isdecimal():
        return (0, *_steps(group[0], (*reached, 0), rest))
    thing = "folder" if reached == ("data",) else "item"
    count = f"is 1 {thing}" if len(group) == 1 else f"are {len(group)} {thing}s"
    named = _dotted(*reached, 0, *rest[key.isdecimal() :])
    raise ConfigError(f"{name}: there {count}; name one, as {named}", hint="they count from 0")


def _group_below(group: Any, key: str | int) -> object:
    """What a key holds: a group, also where there was a short form of one, or nothing."""
    if isinstance(group, dict):
        below = group.setdefault(key, {})
        if isinstance(below, str) and key in SHORT_FORMS:
            group[key] = SHORT_FORMS[key](below)
    return group[key]


def _dotted(*path: str | int) -> str:
    return printable(".".join(map(str, path)))


def _warn_of_comments(document: Document) -> None:
    for path in document.commented:
        if path[:2] in PROMPT_SETTINGS:
            log.warning(
                "%s: the text ends before the #, the rest is a comment; "
                "put it in quotes if the # belongs to it",
                document.place(path),
            )


def _refusal(name: str, document: Document, problems: dict[KeyPath, Problem]) -> ConfigError:
    order = {where: number for number, where in enumerate(document.places.values())}
    found: Sequence[Problem] = sorted(problems.values(), key=lambda p: order.get(p.where, -1))
    first, *others = found
    if not others:
        return ConfigError(first.what, where=first.where, hint=first.hint)
    return ConfigError(
        f"{len(problems)} settings cannot be used",
        where=name,
        hint="change the lines named here",
        problems=first_few(found, lambda p: f"{p.where}: {p.what}", shown=PROBLEMS_SHOWN),
    )
