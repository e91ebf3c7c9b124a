"""scripts/bench on tiny nets: it runs the same training for all, and prints what it saw."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from eri.layers.backend import current_backend
from scripts.benchmark import cases, foreign, gradients, measure, plot, step
from scripts.benchmark.__main__ import parser
from scripts.benchmark.families import TINY, family_of, random_down, random_weight
from scripts.benchmark.problem import Problem, batch_of, drawn, random_samples
from tests.compvis_names import compvis_unet_names

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def problem(family: str = "sdxl", dtype: torch.dtype = torch.float32, batch: int = 2) -> Problem:
    return Problem(TINY[family], batch, CPU, dtype, side=16 if family == "sd15" else 8)


def batch_for(one: Problem) -> Any:
    return batch_of(random_samples(one.family, one.side), 0, one.batch)


def bench(*arguments: object) -> int:
    chosen = parser().parse_args([*map(str, arguments), "--device", "cpu"])
    return chosen.run(chosen)


# --------------------------------------------------------------------------- the same training


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_case_trains_the_same_net_on_the_same_samples(family: str) -> None:
    one = problem(family)
    found = {
        name: cases.build(name, one).gradients(batch_for(one))
        for name in ("eager", "checkpointed", "graph", "eri", "eri:lean=on,recompute=blocks")
    }
    reference = found.pop("eager")
    assert len(reference) == 2 * one.family.modules
    for name, others in found.items():
        errors = gradients.errors([others], [reference])
        assert errors.whole < 1e-4, name
        assert errors.each[errors.worst] < 1e-3, name


def test_no_gradient_is_zero_and_the_prediction_is_of_size_one() -> None:
    one = problem()
    case = cases.build("eri", one)
    assert 0.1 < case.prediction(batch_for(one)).std() < 10
    assert all(g.norm() > 0 for g in case.gradients(batch_for(one)).values())


@pytest.mark.parametrize("name", ["eager", "graph", "eri", "eri:micro=1,recompute=projections"])
def test_a_step_trains(name: str) -> None:
    case = cases.build(name, problem())
    before = {key: matrix.clone() for key, matrix in case.matrices().items()}
    case.step()
    case.eager_step()
    after = case.matrices()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert case.train_on(batch_for(problem())) > 0


def test_settings_of_a_run_are_options_of_its_case() -> None:
    one = problem()
    torch.manual_seed(1)
    plain = cases.build("eri:rank=4", one).gradients(batch_for(one))
    try:
        case = cases.build("eri:rank=4,dropout=50,backend=reference,deterministic=on", one)
        assert current_backend() == "reference" and torch.are_deterministic_algorithms_enabled()
        dropped = case.gradients(batch_for(one))
    finally:
        cases.build("eri", one)
    assert current_backend() == "auto" and not torch.are_deterministic_algorithms_enabled()
    downs = [key for key in plain if key.endswith(".down")]
    assert {plain[key].shape[0] for key in downs} == {4}
    assert all(not torch.equal(plain[key], dropped[key]) for key in downs)


def test_weights_hang_on_their_name_alone() -> None:
    assert torch.equal(
        random_weight("a.weight", (4, 6), CPU), random_weight("a.weight", (4, 6), CPU)
    )
    assert not torch.equal(
        random_weight("a.weight", (4, 6), CPU), random_weight("b.weight", (4, 6), CPU)
    )
    # a 1x1 convolution of one net is a linear layer of another
    flat = random_weight("a.weight", (4, 6, 1, 1), CPU).flatten(1)
    assert torch.equal(flat, random_weight("a.weight", (4, 6), CPU))
    assert random_down("a", (4, 100), CPU).abs().max() <= 0.1


def test_the_peers_get_the_draws_of_eri() -> None:
    one = problem()
    case = cases.build("eri", one)
    given = case._drawn(batch_for(one))  # type: ignore[attr-defined]
    inputs = drawn(batch_for(one), one)
    assert torch.equal(given["noise"], inputs.noise)
    assert torch.equal(given["timesteps"], inputs.timesteps)
    assert torch.equal(given["mean"] + given["std"] * given["latent"], inputs.latents)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eri:fast=on", "no option 'fast'"),
        ("eri:lean=maybe", "expected one of on, off"),
        ("eri:micro=two", "expected a number"),
        ("eri:lean", "expected option=value"),
        ("eager:lean=on", "only eri has options"),
        ("diffuser", "no case 'diffuser'"),
        ("kohya", "--kohya PATH"),
        ("onetrainer", "--onetrainer PATH"),
    ],
)
def test_a_case_that_is_none_is_explained(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cases.build(text, problem())


# ------------------------------------------------------------------------------ other trainers


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkout for kohya"):
        cases.build("kohya", problem(), cases.Checkouts(kohya=tmp_path))


def test_onetrainer_is_trained_without_what_its_layers_do_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with the interface of OneTrainer's, which imports what is not installed."""
    folder = tmp_path / "modules" / "module"
    folder.mkdir(parents=True)
    (folder / "LoRAModule.py").write_text(
        "from modules.util.quantization_util import get_weight_shape\n"
        "from modules.util.config.TrainConfig import TrainConfig\n"
        "import torch\n"
        "class LoRAModule(torch.nn.Module):\n"
        "    def __init__(self, prefix, layer, rank, alpha):\n"
        "        super().__init__()\n"
        "        self.layer, self.old = [layer], layer.forward\n"
        "        shape = get_weight_shape(layer)\n"
        "        like = dict(kernel_size=1, bias=False)\n"
        "        if len(shape) == 4:\n"
        "            self.lora_down = torch.nn.Conv2d(shape[1], rank, **like)\n"
        "            self.lora_up = torch.nn.Conv2d(rank, shape[0], **like)\n"
        "        else:\n"
        "            self.lora_down = torch.nn.Linear(shape[1], rank, bias=False)\n"
        "            self.lora_up = torch.nn.Linear(rank, shape[0], bias=False)\n"
        "    def hook_to_module(self):\n"
        "        self.layer[0].forward = self.forward\n"
        "    def forward(self, x):\n"
        "        return self.old(x) + self.lora_up(self.lora_down(x))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    one = problem("sd15")
    checkouts = cases.Checkouts(onetrainer=tmp_path)
    try:
        theirs = cases.build("onetrainer-checkpointed", one, checkouts).gradients(batch_for(one))
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "modules":
                del sys.modules[name]
    reference = cases.build("eager", one).gradients(batch_for(one))
    assert gradients.errors([theirs], [reference]).whole < 1e-5


def test_kohyas_names_are_known() -> None:
    from diffusers import UNet2DConditionModel

    one = problem()
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**one.family.config).state_dict()
    names = compvis_unet_names(theirs)
    kohyas: Any = SimpleNamespace(state_dict=lambda: dict.fromkeys(names.values()))
    found = foreign._names_in_diffusers(kohyas, one)
    assert found == {there: name for name, there in names.items()}


@pytest.mark.parametrize("pattern", ["b n (h d) -> b h n d", "b h n d -> b n (h d)"])
def test_what_stands_in_for_einops_rearranges(pattern: str) -> None:
    tokens = torch.arange(2 * 5 * 12).view(2, 5, 12)
    heads = torch.stack(tokens.chunk(3, dim=-1), dim=1)
    there, back = (tokens, heads) if pattern.startswith("b n") else (heads, tokens)
    assert torch.equal(foreign._rearrange(there, pattern, h=3), back)
    with pytest.raises(ValueError, match="not one of kohya's"):
        foreign._rearrange(there, "a b -> b a", h=3)


# --------------------------------------------------------------------------------- measurements


def test_a_table_names_what_moves_most() -> None:
    table = measure.traffic({"aten::add": 2 * 10**9, "aten::mul": 3 * 10**9})
    assert [line.split() for line in table.splitlines()] == [
        ["GB", "operation"], ["3.000", "aten::mul"], ["2.000", "aten::add"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("sm80_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32", "conv"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<BFloat16>", "norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("triton_red_fused_native_group_norm_silu_3", "norm"),
        ("void at::native::vectorized_elementwise_kernel<8, GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copy/cat"),
        ("void at::native::CatArrayBatchedCopy_vectorized<OpaqueType<2u>>", "copy/cat"),
        ("cudnn::engines_precompiled::nchwToNhwcKernel<half, half, float>", "copy/cat"),
        ("Memcpy DtoD (Device -> Device)", "copy/cat"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "reduce"),
        ("void eri::adamw_update<__nv_bfloat16>", "optimizer"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer"),
        ("void philox_something", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name: str, kind: str) -> None:
    assert measure.kernel_class(name) == kind


def test_a_trace_becomes_a_table() -> None:
    events = [
        {"cat": "kernel", "name": "nvjet_a", "dur": 30.0},
        {"cat": "kernel", "name": "nvjet_a", "dur": 30.0},
        {"cat": "kernel", "name": "void at::native::vectorized_elementwise_kernel", "dur": 20},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "dur": 20},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 5},
        {"cat": "kernel", "name": "unfinished"},
    ]
    kernels = measure.kernels_in(events, measure.ON_DEVICE)
    assert measure.launches(kernels) == 3
    lines = measure.breakdown(kernels, 0.125).splitlines()
    assert lines[0] == "kernels take 0.10 ms of a step of 0.12 ms"
    assert lines[2].split() == ["gemm", "0.060", "60.0%", "2"]
    assert [line.split()[0] for line in lines[3:5]] == ["elementwise", "copy/cat"]
    assert lines[6].split() == ["gemm", "0.060", "60.0%", "2", "30.0", "nvjet_a"]
    assert all(len(line) <= 120 for line in lines)


def test_errors_of_gradients() -> None:
    expected = [{"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}]
    found = [{"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.0])}]
    errors = gradients.errors(found, expected)
    assert errors.whole == pytest.approx(0.3 / 5)
    assert errors.each == {"a": pytest.approx(0.1), "b": 0.0}
    assert errors.worst == "a"
    assert errors.cosine == pytest.approx(25 / (5 * (25 + 0.09) ** 0.5))
    with pytest.raises(ValueError, match="other matrices"):
        gradients.errors([{"a": torch.ones(2)}], expected)


# ------------------------------------------------------------------------------------ the table


def options(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["step", *arguments])


def test_a_row_tells_mfu_and_the_share_of_the_floor() -> None:
    row = step.Row("sdxl", "eri", 4, seconds_per_step=[0.2, 0.1, 0.4])
    cells = step._line(row, options("--peak", "790")).split()
    assert cells[:4] == ["eri", "4", "20.00", "200.00"]
    assert cells[-2:] == ["37.3%", "45.4%"]  # 14.74 · 20 / 790 and 22.7 · 20 / 1000
    assert len(step._line(row, options())) <= 120


def test_a_failure_is_a_row_with_its_reason_in_full_below() -> None:
    row = step.Row("sdxl", "eri", 8, failed="out of memory: " + "x" * 200)
    text = step.report([row], {"card": "none"}, options("--family", "sdxl"))
    lines = text.splitlines()
    assert all(len(line) <= 120 for line in lines if "xxx" not in line or "  failed" in line)
    assert any(line.endswith("x" * 200) for line in lines)


def test_a_case_that_computes_something_else_is_told() -> None:
    said = [{"prediction_std": 0.65}, {"prediction_std": 0.655}, {"prediction_std": 0.49}]
    rows = [step.Row("sdxl", "eri", 1, details=one, failed="later") for one in said]
    assert step._warnings(rows[:2])[-1] == "prediction's deviation: 0.6500 to 0.6550"
    assert "NOT the same net" in step._warnings(rows)[-1]


def test_step_measures_interleaved_and_a_case_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--dtype", "fp32", "--batch", 1, "--steps", 1, "--rounds", 2]
    cases_told = ["--cases", "eri", "eri:fast=on"]
    assert bench("step", *arguments, *cases_told, "--json", out) == 0
    content = json.loads(out.read_text())
    rows = {row["case"]: row for row in content["rows"]}
    assert rows["eri:fast=on"]["failed"].startswith("ValueError: eri has no option 'fast'")
    eri = rows["eri"]
    assert eri["failed"] is None
    assert len(eri["seconds_per_step"]) == 2
    assert 0 < eri["seconds"]["first_step_of_model"] < eri["seconds"]["warm"]
    assert eri["details"]["gb_per_sample"] > 0
    assert 0.1 < eri["details"]["prediction_std"] < 10
    assert content["facts"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "sdxl (tiny) 128²" in printed
    assert all(len(line) <= 120 or "ValueError" in line for line in printed.splitlines())


def test_a_process_that_does_not_answer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "LIMIT", 0.2)  # seconds: less than a net takes to build
    row = step.Row("sdxl", "eager", 1)
    step._side_by_side([row], options("--tiny", "--device", "cpu"), {})
    assert row.failed == "no answer in 0.2 s"


def test_without_any_number_the_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("step", "--tiny", "--cases", "kohya", "--batch", 1) == 1
    assert "kohya needs a checkout: --kohya PATH" in capsys.readouterr().out


# ----------------------------------------------------------------------------- the other commands


def test_gradients_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench("gradients", "--tiny", "--draws", 1, "--resolution", 64, "--json", out) == 0
    content = json.loads(out.read_text())
    assert content.keys() == {"eager", "eri"}
    assert 1e-3 < content["eri"]["whole"] < 0.2
    assert len(content["eri"]["each"]) == 2 * family_of("sdxl", tiny=True).modules
    assert "eri to eager: error" in capsys.readouterr().out


def test_an_error_that_is_larger_fails(capsys: pytest.CaptureFixture[str]) -> None:
    small = gradients.Errors(0.010, 0.99995, {"a": 0.01})
    large = gradients.Errors(0.012, 0.99993, {"a": 0.012})
    assert gradients._compare("eri", {"eri": small, "eager": large}, "eager")
    assert not gradients._compare("eri", {"eri": large, "eager": small}, "eager")
    assert "error 1.200 times" in capsys.readouterr().out


def test_losses_of_the_demo_are_those_of_diffusers(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--steps", 3, "--batch", 2, "--dtypes", "fp32", "--json", out, "--plot", picture]
    assert bench("curves", *arguments) == 0
    content = json.loads(out.read_text())["fp32"]
    assert content["largest"] < 1e-4 and content["adapters"] < 0.01
    assert len(content["losses"]["eri"]) == 3
    with Image.open(picture) as drawn_picture:
        assert drawn_picture.width > 400


def test_two_ways_of_eri_are_compared_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--model", "sdxl", "--steps", 2, "--batch", 1, "--dtypes", "fp32"]
    assert bench("curves", *arguments, "--compare", "eri", "eri:graphs=off") == 0
    assert "equal bit for bit" in capsys.readouterr().out
    assert bench("curves", *arguments, "--compare", "eri", "eri:lean=on") == 1
    assert "matrices differ" in capsys.readouterr().out


def test_a_plot_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "plot.png"
    plot.plot({"a": {"one": [1, 2, 1], "two": [2, 2, 2]}, "b": {"one": [1.0]}}, path, below="step")
    with Image.open(path) as picture:
        assert picture.size == (2 * plot.WIDTH, plot.HEIGHT)
        colours = picture.convert("RGB").getcolors() or []
    assert {plot.COLOURS[0], plot.COLOURS[1]} <= {f"#{bytes(one).hex()}" for _, one in colours}


def test_the_script_runs_and_tells_what_there_is() -> None:
    script = ROOT / "scripts/bench"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = parser().format_help()
    assert all(command in text for command in ("step", "gradients", "curves", "kernels"))
