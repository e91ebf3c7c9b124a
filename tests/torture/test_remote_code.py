"""A model's folder full of code: nothing of it runs, whatever its config files ask for."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from eri.errors import ModelError
from eri.models import load_text, load_unet, load_vae
from eri.models.words import load_words
from eri.run.base import look_at
from eri.run.inspect import inspect_path

MODULES = (
    "evil", "__init__", "modeling_evil", "tokenization_evil", "configuration_evil", "pipeline",
    "handler", "custom_generate", "setup", "conftest", "sitecustomize", "usercustomize",
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}
ASKS = {  # what each config of a model is told besides; "*" is for every one
    "*": {"auto_map": AUTO_MAP, "trust_remote_code": True, "custom_pipelines": {"a": "pipeline"}},
    "tokenizer_config.json": {"tokenizer_class": "Evil", "tokenizer_file": "evil.py"},
    "model_index.json": {"safety_checker": ["evil", "Evil"], "image_encoder": ["evil", "Evil"]},
    "scheduler_config.json": {"_class_name": "evil.Evil"},
}
WATCHED = ("open", "exec", "compile", "import")
LEAVES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")

events: list[str] | None = None  # what the hook saw while somebody watched
folder_of_events = ""


def hook(event: str, details: tuple[Any, ...]) -> None:
    if events is None:
        return
    first = str(details[0]) if details else ""
    if event == "exec":
        first = getattr(details[0], "co_filename", "")
    elif event == "compile":
        first = str(details[1])
    code = folder_of_events in first and first.endswith((".py", ".pyc", ".so"))
    if event in LEAVES or (event in WATCHED and (code or first.split(".")[0] in MODULES[2:5])):
        events.append(f"{event} {first}")


sys.addaudithook(hook)  # there is no way to take it off; it does nothing unless somebody watches


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What is opened, compiled, run or imported of a folder's code, and what leaves the process."""
    global events, folder_of_events
    seen: list[str] = []
    events, folder_of_events = seen, str(folder)
    try:
        yield seen
    finally:
        events = None


@pytest.fixture(params=["sd15", "sdxl"])
def trapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose folders are full of code that leaves a canary, and whose configs ask for it."""
    folder = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model"))
    code = f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Evil: pass\n"
    for path in [folder, *filter(Path.is_dir, folder.iterdir())]:
        for name in MODULES:
            (path / f"{name}.py").write_text(code)
    for path in folder.rglob("*.json"):
        of_a_net = path.parent.name in {"unet", "vae"}  # these refuse what they do not know
        if not of_a_net and (path.name in ASKS or path.name == "config.json"):
            add(path, ASKS["*"] | ASKS.get(path.name, {}))
    return folder


def add(config: Path, fields: dict[str, Any]) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def use(folder: Path) -> int:
    """Everything that reads a base model; how much of it was not refused."""
    readers: list[Callable[[Path], object]] = [
        inspect_path, lambda path: look_at(str(path)), load_unet, load_vae, load_words, load_text,
    ]  # fmt: skip
    read = 0
    for reader in readers:
        with suppress(ModelError):
            reader(folder)
            read += 1
    return read


def test_no_code_of_a_model_runs(trapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trapped)
    with watched(trapped) as seen:
        read = use(trapped)
    assert read == 6, "a config is refused, so that not everything was shown"
    assert not (trapped.parent / "canary").exists()
    assert not seen
    assert not [name for name in sys.modules if name.split(".")[-1] in MODULES[2:5]]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_net_that_asks_for_code_is_refused(trapped: Path, part: str) -> None:
    add(trapped / part / "config.json", ASKS["*"])
    with watched(trapped) as seen, pytest.raises(ModelError) as refused:
        {"unet": load_unet, "vae": load_vae}[part](trapped)
    assert "auto_map" in "".join(refused.value.problems)
    assert not seen
    assert not (trapped.parent / "canary").exists()


def test_a_tokenizer_that_asks_for_code_is_clips_own(trapped: Path) -> None:
    with watched(trapped) as seen:
        words = load_words(trapped)
    assert {type(reader.tokenizer).__name__ for reader in words.readers} == {"CLIPTokenizer"}
    assert not seen


def test_the_trap_would_have_been_seen(trapped: Path) -> None:
    """Control: had the code been run, the canary would be there and the hook would have told."""
    with watched(trapped) as seen:
        runpy.run_path(str(trapped / "tokenizer" / "evil.py"))
    assert (trapped.parent / "canary").exists()
    assert any(event.startswith("exec") for event in seen)
