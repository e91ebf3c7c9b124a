"""From a YAML file and `--set` to a `Config`, or to all of its problems at once."""

import logging
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from eri.config.problems import schema_problems
from eri.config.schema import Config
from eri.config.strict_yaml import Document, KeyPath, Problem, parse
from eri.errors import ConfigError
from eri.printable import printable

__all__ = ["load_config", "make_config"]

MAX_BYTES = 1_000_000
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
    path = _put(settings, named, changed.value)
    if path is None:
        what = f"{printable(key)} stands below a value that is not a mapping"
        document.places[named] = where
        document.problems[named] = Problem(where=where, what=what, hint="set the whole value")
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


def _put(settings: dict[str, object], path: KeyPath, value: object) -> KeyPath | None:
    """Set a value, below short forms and an only list item as well; the path that it then has."""
    reached: KeyPath = ()
    for key in map(str, path[:-1]):
        below = settings.setdefault(key, {})
        if isinstance(below, str) and key in SHORT_FORMS:
            below = settings[key] = SHORT_FORMS[key](below)
        reached = (*reached, key)
        if isinstance(below, list) and len(below) == 1:  # of several, which one is not said
            below, reached = below[0], (*reached, 0)
        if not isinstance(below, dict):
            return None
        settings = below
    settings[str(path[-1])] = value
    return (*reached, path[-1])


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
    found: Iterable[Problem] = sorted(problems.values(), key=lambda p: order.get(p.where, -1))
    first, *others = found
    if not others:
        return ConfigError(first.what, where=first.where, hint=first.hint)
    return ConfigError(
        f"{len(problems)} settings cannot be used",
        where=name,
        hint="change the lines named here",
        problems=[f"{problem.where}: {problem.what}" for problem in found],
    )
