"""scripts/bench kernels on the CPU: it times every kernel, beside the same work in PyTorch."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from eri.layers import backend
from eri.layers.add_maps import add_maps
from eri.layers.lora_copies import LoRACopies
from eri.layers.lora_products import lora_gradient
from scripts.benchmark import kernel_cases, kernels, row_cases
from scripts.benchmark.__main__ import parser
from scripts.benchmark.families import FAMILIES
from scripts.benchmark.kernel_shapes import NETS, TINY_NETS
from scripts.benchmark.kernel_work import Case, Draw

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def bench(*arguments: object, device: str = "cpu") -> int:
    chosen = parser().parse_args([*map(str, arguments), "--device", device])
    return chosen.run(chosen)


def test_kernels_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench("kernels", "--tiny", "--json", out) == 0
    content = json.loads(out.read_text())
    assert {row["kernel"] for row in content["rows"]} == set(kernel_cases.KERNELS)
    for row in content["rows"]:
        assert row["failed"] is None
        assert row["microseconds"] > 0 and row["pytorch"] > 0
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] / 1e3)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert sum("×" in line for line in lines) == len(content["rows"])


@pytest.mark.gpu
def test_kernels_are_timed_on_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "out.json", backend.current_backend()
    assert bench("kernels", "--tiny", "--json", out, device="cuda") == 0, capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(kernel_cases.KERNELS)
    assert all(row["sets"] > 16 and row["microseconds"] > 0.5 for row in rows)  # and really ran
    assert backend.current_backend() == before
    only = ["--only", "layer_norm", "group_norm_silu", "--family", "sd15"]
    assert bench("kernels", *only, "--json", out, device="cuda") == 0
    content = json.loads(out.read_text())
    for row in content["rows"]:  # larger than the cache, and no faster than memory allows
        assert not row["cached"]
        assert row["gb_per_second"] < 1.3 * content["copy_gb_per_second"]


def test_the_kernels_are_those_of_the_library() -> None:
    found = set()
    for source in (ROOT / "eri/layers/csrc").glob("*.cpp"):
        found |= set(re.findall(r'm\.impl\("(\w+?)_?"', source.read_text()))
    assert found == set(kernel_cases.KERNELS)


def test_some_kernels_alone_can_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("kernels", "--tiny", "--only", "geglu", "join_rows") == 0
    table = capsys.readouterr().out.partition("kernel  ")[2].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["geglu", "join_rows", "join_rows"]
    with pytest.raises(SystemExit):
        bench("kernels", "--tiny", "--only", "gelu")
    assert "invalid choice: 'gelu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [one for one in kernel_cases.cases(TINY_NETS) if one.kernel != "adamw"],
    ids=lambda one: f"{one.kernel} {one.shape}",
)
def test_pytorch_is_timed_on_the_same_work(case: Case) -> None:
    torch.manual_seed(0)
    ours, theirs, size = case.make(Draw(CPU, torch.float32))
    found, expected = (results(work, changed_by(ours)) for work in (ours, theirs))
    assert expected and size > 0
    for one in expected:
        assert any(is_the_same(part, one) for other in found for part in parts_like(other, one))


def changed_by(work: Any) -> list[torch.Tensor]:
    """What is changed in place, and is no result."""
    if isinstance(work, LoRACopies):
        return [copy.target for copy in work.copies]
    function = getattr(work, "func", None)
    if function is add_maps:
        return [work.args[0]]
    if function in {lora_gradient, torch.ops.eri.lora_gradients}:
        return tree_leaves(work.args[4:])
    return []


def results(work: Any, changed: list[torch.Tensor]) -> list[torch.Tensor]:
    for tensor in changed:
        tensor.zero_()
    found = work()
    kept = changed or [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    # statistics are told in other ways
    return [tensor.clone() for tensor in kept if tensor.dtype == torch.float32]


def parts_like(found: torch.Tensor, one: torch.Tensor) -> list[torch.Tensor]:
    """What may be the other among it: all, all without a tail, or its second half."""
    width = one.numel() // found[..., 0].numel()
    return [found[..., :width], found[..., width:]]


def is_the_same(found: torch.Tensor, one: torch.Tensor) -> bool:
    """In whichever order the numbers lie."""
    values = [tensor.flatten().sort().values for tensor in (found, one)]
    return found.numel() == one.numel() and torch.allclose(*values, rtol=1e-3, atol=1e-4)


def test_a_kernel_that_fails_is_a_row_and_the_others_follow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    monkeypatch.setattr(row_cases, "geglu", fail)
    assert bench("kernels", "--tiny", "--only", "geglu", "join_rows") == 1
    *_, failed, first, second = capsys.readouterr().out.splitlines()
    assert failed.startswith("geglu ")
    assert failed.endswith("failed: RuntimeError: CUDA error: out of memory")
    assert first.startswith("join_rows ") and second.startswith("join_rows ")


def test_operands_do_not_fit_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cache_bytes", lambda _: 20_000)
    (case,) = (one for one in kernel_cases.cases(TINY_NETS) if one.kernel == "geglu")
    row = kernels.measure(case, CPU)  # 16 rows of 768 numbers of 2 bytes are moved
    assert (row.bytes, row.sets, row.cached) == (24_576, 4, False)
    monkeypatch.setattr(kernels, "MOST_SETS", 1)
    assert kernels.measure(case, CPU).cached


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_sizes_of_the_kernels_are_those_of_the_nets(family: str) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.models.resnet import ResnetBlock2D

    net, whole = NETS[family], FAMILIES[family]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**whole.config)
    adapted = [
        tuple(module.weight.shape[:2])
        for name, module in unet.named_modules()
        if "attentions" in name and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    assert sorted(adapted) == sorted(net.adapted())
    assert len(adapted) == whole.modules
    maps, sums = set(), set()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, x: maps.add((x[0].shape[1], x[0].shape[2])))
        if isinstance(module, ResnetBlock2D):
            module.register_forward_hook(lambda *given: sums.add(given[2].shape[1:3]))
    with torch.device("meta"), torch.no_grad():
        side, words = whole.side, torch.zeros(1, 77, whole.context_dim)
        extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        unet(torch.zeros(1, 4, side, side), torch.zeros(1), words, added_cond_kwargs=extra)
    assert set(net.maps) == maps and set(net.sums) == sums
