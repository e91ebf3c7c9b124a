"""ERI_KERNELS=portable: the kernels without what only the newer cards have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.lora_products import lora_gradient, lora_gradient_reference
from eri.layers.toolchain import Toolchain, architecture, code_for, find_toolchain, is_portable
from tests.kernel_checks import error, ulp
from tests.layers.test_lora_products import Case, case

HOPPER = (9, 0)
CLUSTER = "this_cluster().map_shared_rank(mine"  # what blocks of a cluster share memory by


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERI_KERNELS", "portable")


@pytest.mark.parametrize(
    ("card", "option"),
    [
        ("86", "arch=compute_86,code=sm_86"),
        ("90a", "arch=compute_90a,code=sm_90a"),
        ("120+PTX", "arch=compute_120,code=[sm_120,compute_120]"),
        ("90-portable", "arch=compute_80,code=sm_90"),
    ],
)
def test_what_a_card_is_compiled_for(card: str, option: str) -> None:
    assert code_for(card) == f"-gencode={option}"


def test_they_have_a_name_of_their_own(portable: None) -> None:
    assert is_portable()
    assert [architecture(card) for card in (HOPPER, (12, 0))] == ["90-portable", "120-portable"]


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERI_KERNELS", "")
    assert architecture(HOPPER) == "90a"
    monkeypatch.setenv("ERI_KERNELS", "fast")
    with pytest.raises(ConfigError, match="'fast' are no kernels") as caught:
        architecture(HOPPER)
    assert caught.value.where == "ERI_KERNELS"


def real_toolchain() -> Toolchain:
    found = find_toolchain(HOPPER)
    if isinstance(found, list):
        pytest.skip("; ".join(map(str, found)))
    return found


@pytest.mark.parametrize(("card", "has_clusters"), [("90a", True), ("90-portable", False)])
def test_the_compiler_sees_no_clusters(card: str, has_clusters: bool) -> None:
    source = SOURCES / "lora_products_gradient.cu"
    command = [real_toolchain().nvcc, "-std=c++20", "-E", code_for(card), str(source)]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (CLUSTER in seen) == has_clusters


RUN = """
import sys, torch
from eri.layers.backend import set_backend
from eri.layers.lora_products import lora_gradient
set_backend("cuda")
tensors = [tensor.cuda() for tensor in torch.load(sys.argv[1], weights_only=True)]
lora_gradient(*tensors)
torch.save([tensor.cpu() for tensor in tensors[4:]], sys.argv[1])
"""


@pytest.mark.gpu
def test_without_clusters_sums_have_another_order_and_are_as_exact(tmp_path: Path) -> None:
    """Of 4096 tokens and widths of 640, four blocks of a cluster share each sum."""
    if torch.cuda.get_device_capability() < HOPPER or is_portable():
        pytest.skip("needs a card with clusters, and kernels that use them")
    set_backend("cuda")
    torch.manual_seed(0)
    made = case(4096, 640, 640, 16, dtype=torch.bfloat16)
    given = [made.dy, made.x, made.p, made.h, made.d_down, made.d_up]
    c = Case(*(tensor.contiguous() for tensor in given))
    path = tmp_path / "tensors"
    torch.save([c.dy, c.x, c.p, c.h, c.d_down, c.d_up], path)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"ERI_KERNELS": "portable", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "-portable, once" in done.stderr  # they were built
    portable = torch.load(path, weights_only=True)
    truths = c.to(torch.float64).run(lora_gradient_reference)
    eagers, own = c.run(lora_gradient_reference), c.run(lora_gradient)
    for ours, other, eager, truth in zip(own, portable, eagers, truths, strict=True):
        bound = 2 * error(eager, truth) + ulp(truth, torch.float32)
        assert error(ours, truth) <= bound and error(other.cuda(), truth) <= bound
        assert not torch.equal(ours, other.cuda())
