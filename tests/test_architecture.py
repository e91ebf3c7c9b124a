"""The walls of the house: who imports whom, sizes, names, and what importing eri may load.

Each wall is a function from (path in the repository, source) to the lines that break it, run over
every file of eri/ and, as a control, over a snippet that breaks it on purpose.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"errors", "config", "files", "rng", "printable"}
MAY_IMPORT = {
    **{unit: GROUND - {unit} for unit in GROUND},
    "__init__": set(),
    "__main__": set(),
    "cli": GROUND,
    "run": GROUND | {"data", "layers", "models", "adapters", "diffusion", "train", "formats"},
    "data": GROUND,
    "layers": GROUND,
    "models": GROUND | {"layers", "formats"},
    "adapters": GROUND | {"layers", "formats"},
    "diffusion": GROUND,
    "train": GROUND | {"layers", "diffusion", "formats"},
    "formats": GROUND,
}
TORCH_FREE = {"__init__", "__main__", "cli", "errors", "config", "files", "printable"}
TORCH_FREE_FILES = {  # they tell what a model is before any weight is read
    "eri/formats/checkpoint.py",
    "eri/formats/compvis_unet.py",
    "eri/formats/diffusers_folder.py",
    "eri/formats/foreign.py",
    "eri/formats/foreign_config.py",
    "eri/formats/header.py",
    "eri/formats/parts.py",
    "eri/formats/prediction_hints.py",
    "eri/formats/single_file.py",
    "eri/formats/strict_json.py",
    "eri/formats/tail.py",
    "eri/formats/text_names.py",
    "eri/formats/unet_config.py",
    "eri/formats/unet_names.py",
    "eri/formats/unet_shapes.py",
    "eri/formats/vae_names.py",
}
HEAVY = {"diffusers", "transformers", "huggingface_hub"}
HEAVY_INSIDE_FUNCTIONS = {
    "eri/models/text.py",
    "eri/models/vae.py",
    "eri/models/words.py",
    "eri/diffusion/samplers.py",
}
HUB_INSIDE_FUNCTIONS = {"eri/run/hub_client.py"}  # of huggingface_hub
SLOW_TO_LOAD = {"eri.models", "eri.layers", "torch._dynamo", "rich.console"}
LAZILY = {  # unit: what it imports inside functions, so that refusals and signals need not wait
    "cli": {"run"},
    "__main__": {"cli"},
}
SPEAKS_TO_PEOPLE = ("eri/cli", "eri/train/log.py")
BANNED_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3
WITHOUT_TEST_FILE: dict[str, str] = {}  # path: why it has none

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
Wall = Callable[[str, str], Iterator[str]]


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """(path in the repository, source) of every Python file of some folders, else of eri/."""
    for folder in folders or ("eri",):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def module_of(path: str) -> str:
    """The dotted name that a file of eri/ is imported by."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unit_of(path: str) -> str:
    """The unit of the import table that a file of eri/ belongs to."""
    return path.split("/")[1].removesuffix(".py")


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, full name, inside a function) of every import that runs; typing-only ones do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}", inside) for alias in node.names)
        else:
            yield from imports(node, inside=inside or isinstance(node, FUNCTIONS))


def import_table(path: str, source: str) -> Iterator[str]:
    """A unit imports only what its row of the table allows; some it may inside functions."""
    unit = unit_of(path)
    if unit not in MAY_IMPORT:
        yield f"{path}: {unit!r} has no row in the import table"
        return
    for line, name, inside in imports(ast.parse(source)):
        if not name.startswith("eri."):
            continue
        target = name.split(".")[1]
        lazily = LAZILY.get(unit, set()) if inside else set()
        if target not in {unit, "__version__"} | MAY_IMPORT[unit] | lazily:
            yield f"{path}:{line}: {unit} may not import {target}"


def imports_at_the_top(path: str, source: str) -> Iterator[str]:
    """Full names, at the top of the file; inside functions only what the house allows."""
    for line, name, inside in imports(ast.parse(source)):
        package = name.split(".")[0]
        if name.startswith("."):
            yield f"{path}:{line}: import by the full name"
        hub = package == "huggingface_hub"
        places = HUB_INSIDE_FUNCTIONS if hub else HEAVY_INSIDE_FUNCTIONS
        if package in HEAVY and (not inside or path not in places):
            allowed = ", ".join(sorted(places))
            yield f"{path}:{line}: {package} is imported inside functions of {allowed} only"
        elif (
            inside
            and package not in HEAVY
            and not any(name.startswith(f"eri.{unit}") for unit in LAZILY.get(unit_of(path), ()))
        ):
            yield f"{path}:{line}: imports {name} inside a function"


def torch_free(path: str, source: str) -> Iterator[str]:
    """The command line, settings, errors, files and the header parser do without torch."""
    if unit_of(path) not in TORCH_FREE and path not in TORCH_FREE_FILES:
        return
    for line, name, _ in imports(ast.parse(source)):
        if name.split(".")[0] in {"torch", "safetensors"} | HEAVY:
            yield f"{path}:{line}: imports {name}; this file is free of torch"


def sizes(path: str, source: str) -> Iterator[str]:
    """A file of at most 400 lines, a function of at most 60, blocks nested at most 3 deep."""
    if (count := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{path}: {count} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FUNCTIONS):
            continue
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name}: {count} lines, at most {MAX_FUNCTION_LINES}"
        if (depth := nesting(node)) > MAX_NESTING:
            yield f"{path}:{node.lineno}: {node.name} nests {depth} deep, at most {MAX_NESTING}"


def nesting(node: ast.AST) -> int:
    """How deep blocks stand in blocks; `elif` stands beside its `if`, a function starts anew."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def file_names(path: str, source: str) -> Iterator[str]:
    """A file is named after its concept."""
    if path.split("/")[-1] in BANNED_NAMES:
        yield f"{path}: name the concept"


def safe_loading(path: str, source: str) -> Iterator[str]:
    """Nothing that a file says is run: no pickle, no code of a model, no program, no YAML tag."""
    tree = ast.parse(source)
    names = full_names(tree)
    pickled = {"pickle.dumps(", *made_by(tree, "pickle.dumps")}
    for node in ast.walk(tree):
        line = f"{path}:{getattr(node, 'lineno', 0)}:"
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = {names[alias.asname or alias.name] for alias in node.names}
            yield from (f"{line} imports {name}" for name in sorted(found) if runs_code(name))
        elif isinstance(node, ast.Name | ast.Attribute):
            if runs_code(name := full_name(node, names)):
                yield f"{line} {name}"
        elif isinstance(node, ast.Call):
            name = full_name(node.func, names)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield from (f"{line} {name} with {k}" for k in sorted(RUN_CODE_IF_GIVEN & given.keys()))
            safe = given.get("weights_only")
            if safe not in {None, "True"} or (name == "torch.load" and safe is None):
                yield f"{line} {name} without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield f"{line} {name} with allow_pickle"
            own = path.startswith("tests/") and ast.unparse(node).startswith(
                tuple(f"pickle.loads({of}" for of in pickled)
            )
            if name in UNPICKLE and not own:
                yield f"{line} {name}"


RUN_CODE_IF_GIVEN = {"trust_remote_code", "custom_pipeline", "custom_revision"}
UNPICKLE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "_pickle.load"}
RUNS_CODE = re.compile(
    r"((builtins\.)?(eval|exec)|marshal\.loads?|numpy\.lib\.format\.read_array|pandas\.read_pickle"
    r"|(joblib|dill|cloudpickle|shelve|picklescan)(\..*)?"
    r"|torch\.(jit\.load|export\.load|hub\.load|package\..*|serialization\.(add_safe_globals|load))"
    r"|yaml\.(load|load_all|full_load(_all)?|unsafe_load(_all)?|((C?(Full|Unsafe))|C)?Loader)"
    r"|transformers\.(.*\.)?(Auto[A-Z]\w*|pipeline|dynamic_module_utils\..*)"
    r"|diffusers\.(.*\.)?(Auto(Model|Pipeline)\w*|dynamic_modules_utils\..*))"
)
"""Full names of what runs code out of a file, or may."""


def runs_code(name: str) -> bool:
    return RUNS_CODE.fullmatch(name) is not None


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for; `import a.b` gives `a`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found[alias.asname or alias.name] = base + alias.name
    return found


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """A name or a dotted name, spelt from its package on: `np.load` is `numpy.load`."""
    first, dot, rest = ast.unparse(node).partition(".")
    return names.get(first, first) + dot + rest


def made_by(tree: ast.AST, call: str) -> set[str]:
    """Names that are given what some call returns."""
    return {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(f"{call}(")
    }


def messages(path: str, source: str) -> Iterator[str]:
    """An assert says what it found; only the command line and the train log print."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"{path}:{node.lineno}: an assert without a message"
        prints = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        if prints and not path.startswith(SPEAKS_TO_PEOPLE):
            yield f"{path}:{node.lineno}: prints"


WALLS: list[Wall] = [
    import_table, imports_at_the_top, torch_free, sizes, file_names, safe_loading, messages,
]  # fmt: skip


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: wall.__name__)
def test_wall_stands(wall: Wall) -> None:
    broken = [line for path, source in sources() for line in wall(path, source)]
    assert not broken, "\n".join(broken)


def test_no_script_and_no_test_runs_what_a_file_says() -> None:
    checked = list(sources("scripts", "tests"))
    broken = [line for path, source in checked for line in safe_loading(path, source)]
    assert not broken, "\n".join(broken)
    assert {"scripts/pretrain_demo.py", "tests/test_architecture.py"} <= {p for p, _ in checked}


NESTED = "def f():\n if a:\n  for b in c:\n   with d:\n    while e:\n     pass\n"
ELIFS = "def f():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass\n elif d:\n  pass\n"


@pytest.mark.parametrize(
    ("wall", "path", "source"),
    [
        (import_table, "eri/layers/norm.py", "from eri.models import UNet"),
        (import_table, "eri/layers/norm.py", "from eri import models"),
        (import_table, "eri/train/loop.py", "import eri.data.folder"),
        (import_table, "eri/cli.py", "from eri.run import train"),
        (import_table, "eri/__main__.py", "from eri.cli import main"),
        (import_table, "eri/somewhere.py", ""),
        (imports_at_the_top, "eri/layers/norm.py", "from . import linear"),
        (imports_at_the_top, "eri/layers/norm.py", "def f():\n    import json"),
        (imports_at_the_top, "eri/cli.py", "def f():\n    import json"),
        (imports_at_the_top, "eri/cli.py", "def f():\n    from eri.rng import generator"),
        (imports_at_the_top, "eri/models/vae.py", "import diffusers"),
        (imports_at_the_top, "eri/models/unet.py", "def f():\n    import diffusers"),
        (imports_at_the_top, "eri/models/text.py", "def f():\n    import huggingface_hub"),
        (imports_at_the_top, "eri/run/hub_client.py", "def f():\n    import diffusers"),
        (imports_at_the_top, "eri/run/hub_client.py", "import huggingface_hub"),
        (torch_free, "eri/cli.py", "def f():\n    import torch"),
        (torch_free, "eri/formats/header.py", "from torch import nn"),
        (sizes, "eri/rng.py", "x = 1\n" * 401),
        (sizes, "eri/rng.py", "def f():\n" + "    x = 1\n" * 60),
        (sizes, "eri/rng.py", NESTED),
        (file_names, "eri/data/utils.py", ""),
        (safe_loading, "eri/rng.py", "torch.load(path)"),
        (safe_loading, "eri/rng.py", "torch.load(path, weights_only=False)"),
        (safe_loading, "eri/rng.py", "other.load(path, weights_only=False)"),
        (safe_loading, "eri/rng.py", "other.load(path, weights_only=safe)"),
        (safe_loading, "eri/rng.py", "pickle.loads(data)"),
        (safe_loading, "eri/rng.py", "pickle.loads(pickle.dumps(1))"),
        (safe_loading, "tests/test_rng.py", "pickle.loads(path.read_bytes())"),
        (safe_loading, "scripts/demo.py", "from torch import load\nload(path)"),
        (safe_loading, "scripts/demo.py", "import torch as t\nt.load(path)"),
        (safe_loading, "scripts/demo.py", "from pickle import loads as f\nf(data)"),
        (safe_loading, "scripts/demo.py", "eval(text)"),
        (safe_loading, "scripts/demo.py", "from builtins import exec as f\nexec(text)"),
        (safe_loading, "scripts/demo.py", "torch.jit.load(path)"),
        (safe_loading, "scripts/demo.py", "torch.export.load(path)"),
        (safe_loading, "scripts/demo.py", "CLIP.from_pretrained(path, trust_remote_code=True)"),
        (safe_loading, "scripts/demo.py", "Pipeline.from_pretrained(path, custom_pipeline=x)"),
        (safe_loading, "scripts/demo.py", "from transformers import AutoModel"),
        (safe_loading, "scripts/demo.py", "from transformers import AutoTokenizer"),
        (safe_loading, "scripts/demo.py", "import transformers\ntransformers.AutoConfig"),
        (safe_loading, "scripts/demo.py", "from diffusers import AutoPipelineForText2Image"),
        (safe_loading, "scripts/demo.py", "yaml.load(text)"),
        (safe_loading, "scripts/demo.py", "yaml.load(text, Loader=yaml.SafeLoader)"),
        (safe_loading, "scripts/demo.py", "yaml.parse(text, Loader=yaml.FullLoader)"),
        (safe_loading, "scripts/demo.py", "from yaml import unsafe_load"),
        (safe_loading, "scripts/demo.py", "np.load(path, allow_pickle=True)"),
        (safe_loading, "scripts/demo.py", "import joblib"),
        (safe_loading, "scripts/demo.py", "from joblib import load"),
        (messages, "eri/rng.py", "assert x"),
        (messages, "eri/train/loop.py", "print(1)"),
    ],
)
def test_wall_catches(wall: Wall, path: str, source: str) -> None:
    assert list(wall(path, source))


@pytest.mark.parametrize(
    ("wall", "path", "source"),
    [
        (import_table, "eri/cli.py", "def f():\n    from eri.run import train"),
        (import_table, "eri/models/unet.py", "from eri.layers import Linear"),
        (imports_at_the_top, "eri/cli.py", "def f():\n    from eri.run import train"),
        (imports_at_the_top, "eri/__main__.py", "def f():\n    from eri.cli import main"),
        (imports_at_the_top, "eri/models/vae.py", "def f():\n    import diffusers"),
        (imports_at_the_top, "eri/run/hub_client.py", "def f():\n    import huggingface_hub"),
        (sizes, "eri/rng.py", ELIFS),
        (safe_loading, "eri/rng.py", "torch.load(path, weights_only=True)"),
        (safe_loading, "eri/rng.py", "yaml.parse(text, Loader=yaml.SafeLoader)"),
        (safe_loading, "eri/rng.py", "from diffusers import AutoencoderKL"),
        (safe_loading, "eri/rng.py", "model.eval()"),
        (safe_loading, "tests/test_rng.py", "pickle.loads(pickle.dumps(1))"),
        (safe_loading, "tests/test_rng.py", "text = pickle.dumps(1)\npickle.loads(text)"),
        (safe_loading, "scripts/demo.py", "np.load(path, allow_pickle=False)"),
        (messages, "eri/cli.py", "print(1)"),
    ],
)
def test_wall_lets_through(wall: Wall, path: str, source: str) -> None:
    assert not list(wall(path, source))


def import_loop(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle, or nothing."""
    remaining = dict(graph)
    while free := [name for name, needs in remaining.items() if not needs & remaining.keys()]:
        for name in free:
            del remaining[name]
    return sorted(remaining)


def test_no_import_loops() -> None:
    modules = {module_of(path): source for path, source in sources()}
    graph = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for _, name, inside in imports(ast.parse(source))
            if not inside
        }
        for module, source in modules.items()
    }
    assert not import_loop(graph)
    assert import_loop({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


def missing_tests(files: list[str], tests: set[str]) -> list[str]:
    """Files of eri/ without a test file at the mirrored path."""
    return [
        path
        for path in files
        if not path.endswith(("__init__.py", "__main__.py"))
        and path not in WITHOUT_TEST_FILE
        and "/".join(["tests", *path.split("/")[1:-1], "test_" + path.split("/")[-1]]) not in tests
    ]


def test_every_file_has_its_tests() -> None:
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not missing_tests([path for path, _ in sources()], tests)
    assert missing_tests(["eri/a/b.py", "eri/c.py"], {"tests/test_b.py", "tests/test_c.py"}) == [
        "eri/a/b.py"
    ]


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys; print(*(n for n in sys.modules if '.' not in n), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_eri_loads_neither_diffusers_nor_transformers() -> None:
    modules = [module_of(path) for path, _ in sources() if not path.endswith("__main__.py")]
    assert not loaded_by("import " + ", ".join(modules)) & HEAVY
    assert loaded_by("import transformers") & HEAVY


def test_what_worker_processes_import_is_no_heavier_than_torch() -> None:
    def heavy(module: str) -> str:
        code = f"import sys, {module}; print(*(n for n in sys.modules if n in {SLOW_TO_LOAD}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert not heavy("eri.run.samples")
    assert heavy("eri.run.dataset")


def test_torch_free_files_load_no_torch() -> None:
    modules = [
        module_of(path)
        for path, _ in sources()
        if (unit_of(path) in TORCH_FREE or path in TORCH_FREE_FILES)
        and not path.endswith("__main__.py")
    ]
    assert "torch" not in loaded_by("import " + ", ".join(modules))
    assert "torch" in loaded_by("import eri.rng")
