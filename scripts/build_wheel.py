"""Writes the wheel that brings the CUDA kernels along; see scripts/build-wheel.

The wheel has what pyproject.toml says of the package, all files of eri/, and in eri/layers/kernels
the library with its manifest. It is for any Python 3 and, through the stable ABI, for any PyTorch
from 2.10 on, and its platform tag is that of the oldest system which the library runs on.
"""

import argparse
import base64
import hashlib
import platform
import re
import shutil
import stat
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import eri
from eri.errors import EriError
from eri.files import commit_folder
from eri.layers import prebuilt
from eri.layers.build import STABLE_ABI, source_hash
from eri.layers.prebuilt import LIBRARY, identity_of
from eri.layers.toolchain import Toolchain, cuda_version, find_toolchain
from scripts.fat_library import (
    LibraryError,
    check_kernels,
    code_of,
    compile_for,
    kernels_of,
    platform_tag,
)

ROOT = Path(__file__).parents[1]
CARDS = ("80", "86", "89", "90a", "120+PTX")
PLACE = prebuilt.FOLDER.relative_to(Path(eri.__file__).parents[1]).as_posix()
LEFT_OUT = {"__pycache__", ".DS_Store", "Thumbs.db"}
DATE = (2020, 2, 2, 0, 0, 0)  # of every file: the same sources are the same bytes


def metadata(project: dict[str, Any], version: str, readme: str) -> str:
    """What an installer reads: the `project` table of pyproject.toml as core metadata 2.4."""
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {version}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        *(f"License-File: {name}" for name in project["license-files"]),
        f"Keywords: {','.join(project['keywords'])}",
        *(f"Classifier: {name}" for name in project["classifiers"]),
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {need}" for need in project["dependencies"]),
    ]
    for extra, needs in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        for need in needs:
            what, _, marker = (part.strip() for part in need.partition(";"))
            only = f"({marker}) and " if marker else ""
            lines.append(f"Requires-Dist: {what}; {only}extra == '{extra}'")
    lines.append("Description-Content-Type: text/markdown")
    return "\n".join(lines) + f"\n\n{readme}"


def package_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(path in the wheel, file) of everything in eri/ that is not made by running it."""
    for path in sorted((root / "eri").rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not LEFT_OUT & set(name.parts) and not name.is_relative_to(PLACE):
            yield name.as_posix(), path


def write_wheel(folder: Path, kernels: Path, platform_name: str, root: Path = ROOT) -> Path:
    """Write the wheel into a folder.

    Args:
        folder: made if needed; a wheel of the same name is replaced.
        kernels: a folder with the library and its manifest.
        platform_name: of the systems that it is for, as `manylinux_2_34_x86_64`.
        root: of the repository.

    Returns:
        Its path.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = re.sub(r"[-_.]+", "_", project["name"]), eri.__version__
    tag, about = f"py3-none-{platform_name}", f"{name}-{version}.dist-info"
    readme = (root / project["readme"]).read_text(encoding="utf-8")
    commands = "".join(f"{key} = {value}\n" for key, value in project["scripts"].items())
    form = "Wheel-Version: 1.0\nGenerator: scripts/build-wheel\nRoot-Is-Purelib: false\n"
    contents = {path: file.read_bytes() for path, file in package_files(root)}
    contents |= {f"{PLACE}/{file.name}": file.read_bytes() for file in sorted(kernels.iterdir())}
    licenses = {file: (root / file).read_bytes() for file in project["license-files"]}
    contents |= {f"{about}/licenses/{file}": content for file, content in licenses.items()}
    contents |= {
        f"{about}/METADATA": metadata(project, version, readme).encode(),
        f"{about}/WHEEL": f"{form}Tag: {tag}\n".encode(),
        f"{about}/entry_points.txt": f"[console_scripts]\n{commands}".encode(),
        **{
            f"{about}/licenses/{file}": (root / file).read_bytes()
            for file in project["license-files"]
        },
    }
    contents[f"{about}/RECORD"] = record(contents, f"{about}/RECORD").encode()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{name}-{version}-{tag}.whl"
    partial = final.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in contents.items():
            entry = zipfile.ZipInfo(path, DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            wheel.writestr(entry, content)
    return partial.replace(final)


def record(contents: dict[str, bytes], own: str) -> str:
    """A line a file: its path, SHA-256 and size; of the record itself the path alone."""
    lines = []
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    return "".join([*lines, f"{own},,\n"])


def find_compilers(cards: Sequence[str]) -> Toolchain:
    """The programs that can build for all cards.

    Raises:
        LibraryError: there are none, with what is missing.
    """
    found: set[Toolchain] = set()
    for card in cards:
        number = card.partition("+")[0].rstrip("a")
        toolchain = find_toolchain((int(number[:-1]), int(number[-1])))
        if isinstance(toolchain, list):
            raise LibraryError("\n".join(map(str, toolchain)))
        found.add(toolchain)
    if len(found) > 1:
        raise LibraryError("no CUDA compiler builds for all cards; set CUDA_HOME to one that does")
    return found.pop()


def build(work: Path, cards: Sequence[str]) -> tuple[Path, str]:
    """Compile the library, look at it, and put it into a folder with its manifest.

    Returns:
        That folder, and the name of the platform.

    Raises:
        LibraryError: it is not fit for a wheel.
        ConfigError: a compiler failed.
    """
    toolchain = find_compilers(cards)
    cuda = cuda_version(toolchain.nvcc) or ""
    print(f"compiling for {', '.join(cards)} with nvcc of CUDA {cuda}; this takes minutes")
    library, said = compile_for(work, toolchain, cards)
    kernels, content = kernels_of(said), library.read_bytes()
    for card, found in kernels.items():
        print(
            f"  sm_{card}: {found.count} kernels, at most {found.shared} bytes of static shared "
            f"memory and {found.registers} registers; {found.spilled} spill"
        )
    for card, code in code_of(content).items():
        print(f"  {card}: {code['bytes'] / 2**20:.2f} MiB of code in {code['pieces']} pieces")
    check_kernels(kernels, content, cards)
    name = platform_tag(library, platform.machine())
    identity = identity_of(source_hash(), cards, cuda=cuda, stable_abi=STABLE_ABI)
    with commit_folder(work / "kernels", identity=identity) as staging:
        shutil.copyfile(library, staging / LIBRARY)
    return work / "kernels", name


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and say what came of it."""
    parser = argparse.ArgumentParser(prog="scripts/build-wheel", description=__doc__)
    parser.add_argument("--cards", nargs="+", default=CARDS, help=f"(default: {' '.join(CARDS)})")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default: dist)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            kernels, name = build(Path(folder), options.cards)
        except (LibraryError, EriError) as error:
            lines = [f"error: {error}", *getattr(error, "problems", ())]
            print("\n".join(lines), file=sys.stderr)
            return 1
        wheel = write_wheel(options.out, kernels, name)
        size = (kernels / LIBRARY).stat().st_size
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, its library {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
