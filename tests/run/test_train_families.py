"""Runs on SDXL and SD2.x: diffusers trains the same, and computes the same with the files."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from eri.adapters import load_adapter
from eri.cli import app
from eri.config import load_config
from eri.errors import Stopped
from eri.formats.header import read_header
from eri.formats.unet_names import to_diffusers
from eri.models import load_unet
from eri.run.export import export
from eri.run.objective import Sample, SampleBatch
from eri.run.train import train
from tests.families import single_file
from tests.run.conftest import Screen, write_config
from tests.run.test_train import digest, steps_in_log, stop_after
from tests.truth import ALPHA, RANK, Deltas, Settings, train_there
from tests.truth import difference as difference_of_updates

STEPS = 3
EPSILON = Settings(lr=1e-2, max_grad_norm=1e-5)
V = replace(EPSILON, prediction="v_prediction")
SIDES = {"sdxl": 64, "sd21": 128}  # of photos; smaller ones leave too few numbers to a norm
PIPELINES: dict[str, Any] = {"sdxl": StableDiffusionXLPipeline, "sd21": StableDiffusionPipeline}


@dataclass(frozen=True)
class Plan:
    """A run to be made: on what, by which settings, and what is to be found in its file."""

    family: str
    truth: Settings  # what diffusers has to be told to train the same
    told: dict[str, str]  # in the header of its file
    wrong: dict[str, Any] = field(default_factory=dict)  # in `truth`, what makes a difference
    as_file: bool = False
    markers: tuple[str, ...] = ()  # in the single file
    prediction: str = "auto"
    by_command: bool = False


SDXL = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}
SD21 = {
    "ss_base_model_version": "sd_v2_v",
    "ss_v2": "True",
    "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    "modelspec.implementation": "diffusers",
    "modelspec.prediction_type": "v",
}
PLANS = {
    "sdxl": Plan(
        "sdxl",
        EPSILON,
        told=SDXL | {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"},
        wrong={"size_ids": (1, 0, 3, 2, 5, 4)},
        by_command=True,
    ),
    "sdxl file v": Plan(
        "sdxl",
        replace(V, zero_terminal_snr=True),
        told=SDXL | {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
        wrong={"zero_terminal_snr": False},
        as_file=True,
        markers=("v_pred", "ztsnr"),
    ),
    "sd21": Plan("sd21", V, told=SD21, wrong={"prediction": "epsilon"}),
    # no file of SD2.x tells what it predicts
    "sd21 file": Plan("sd21", V, told=SD21, as_file=True, prediction="v"),
}


@dataclass(frozen=True)
class Run:
    """A finished run, and what it was trained on."""

    plan: Plan
    base: Path  # a diffusers folder
    model: Path  # what it was told to train on: that folder, or a single file of it
    config: Path
    settings: list[str]  # over those of the config
    said: str

    @property
    def folder(self) -> Path:
        return self.config.parent / "disc"

    @property
    def adapter(self) -> Path:
        return self.folder / "disc.safetensors"

    @property
    def pipeline(self) -> Any:
        return pipeline_of(self.plan.family, self.base)


@cache
def pipeline_of(family: str, base: Path) -> Any:
    return PIPELINES[family].from_pretrained(base)


def train_words(config: Path, settings: list[str]) -> list[str]:
    return ["train", str(config), *(word for setting in settings for word in ("--set", setting))]


def by_command(config: Path, settings: list[str]) -> str:
    command = [sys.executable, "-m", "eri", *train_words(config, settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_this_process(config: Path, settings: list[str]) -> str:
    screen = Screen()
    train(load_config(config, settings), screen.console)
    return screen.text


def overrides(plan: Plan, model: Path) -> list[str]:
    """The settings of a plan, as `--set` takes them."""
    truth = plan.truth
    return [
        f"model={{path: {model}, prediction: {plan.prediction}}}",
        f"adapter={{rank: {RANK}, alpha: {ALPHA}}}",
        f"train={{steps: {STEPS}, batch_size: 2, lr: {truth.lr}, seed: {truth.seed}, "
        f"weight_decay: {truth.weight_decay}, max_grad_norm: {truth.max_grad_norm}}}",
    ]


def change_photos(folder: Path, side: int) -> None:
    """Photos whose sizes are trained on as they are, and a single one that is held out."""
    for path in folder.glob("*/*.png"):
        with Image.open(path) as picture:
            changed = picture.resize(picture.size if picture.size == (64, 128) else (side, side))
        changed.save(path)
    for path in folder.glob("held-out/1.*"):
        path.unlink()


def carry_out(plan: Plan, base: Path, folder: Path) -> Run:
    model = base
    if plan.as_file:
        model = single_file(base, folder / f"{plan.family} 基.safetensors", markers=plan.markers)
    config, settings = write_config(folder, model), overrides(plan, model)
    change_photos(folder, SIDES[plan.family])
    start = by_command if plan.by_command else in_this_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERI_CACHE", str(folder / "cache"))
        return Run(plan, base, model, config, settings, start(config, settings))


@pytest.fixture(scope="module")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, sdxl: Path, sd21: Path
) -> Callable[[str], Run]:
    """A run by its name in `PLANS`, made when it is first asked for; read only."""
    bases, made = {"sdxl": sdxl, "sd21": sd21}, {}

    def run(name: str) -> Run:
        if name not in made:
            plan = PLANS[name]
            made[name] = carry_out(plan, bases[plan.family], tmp_path_factory.mktemp("run"))
        return made[name]

    return run


@pytest.fixture(params=PLANS)
def run(request: pytest.FixtureRequest, run_of: Callable[[str], Run]) -> Run:
    return run_of(request.param)


# ------------------------------------------------- what diffusers would have trained instead


def sample_of(run: Run, file: str) -> Sample:
    """A photo and its caption as the pipeline of diffusers encodes them."""
    path, pipeline = run.config.parent / file, run.pipeline
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    size = tuple(pixels.shape[2:])
    with torch.no_grad():
        latent = pipeline.vae.encode(pixels).latent_dist
        context, _, *pooled = pipeline.encode_prompt(
            path.with_suffix(".txt").read_text(),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    scale = pipeline.vae.config.scaling_factor
    mean, std = latent.mean[0] * scale, latent.std[0] * scale
    if run.plan.family != "sdxl":
        return Sample(file, mean, std, context[0])
    width = pooled[0].shape[1]
    whole = pipeline._get_add_time_ids(
        size, (0, 0), size, dtype=torch.float32, text_encoder_projection_dim=width
    )
    return Sample(file, mean, std, context[0], pooled[0][0], whole[0])


def batches_of(run: Run) -> list[SampleBatch]:
    """What each step saw, by the run's own log."""
    batches, seen = [], 0
    for line in (run.folder / "log.jsonl").read_text().splitlines():
        files = json.loads(line)["files"]
        numbers = range(seen, seen + len(files))
        batches.append(SampleBatch([sample_of(run, file) for file in files], numbers))
        seen += len(files)
    return batches


def updates_of(run: Run) -> Deltas:
    """ΔW of every module, as the last checkpoint has it: in float32."""
    path = run.folder / f"checkpoint-{STEPS:06}" / "adapter.safetensors"
    adapter = load_adapter(load_unet(run.base), path)
    return {to_diffusers(n): layer.delta().detach() for n, layer in adapter.layers.items()}


@pytest.mark.parametrize("name", ["sdxl", "sdxl file v", "sd21"])
def test_diffusers_trains_the_same_from_the_same_photos(
    run_of: Callable[[str], Run], name: str
) -> None:
    run = run_of(name)
    batches, mine, truth = batches_of(run), updates_of(run), run.plan.truth
    assert len({batch.samples[0].mean.shape for batch in batches}) == 2
    assert difference_of_updates(mine, train_there(run.base, truth, batches)) < 1e-5
    wrong = replace(truth, **run.plan.wrong)
    assert difference_of_updates(mine, train_there(run.base, wrong, batches)) > 1e-2


def test_a_single_file_trains_the_same_adapter_as_its_folder(run_of: Callable[[str], Run]) -> None:
    one, other = load_file(run_of("sd21").adapter), load_file(run_of("sd21 file").adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------- what diffusers computes with the files


@torch.no_grad()
def computed(unet: Any, family: str, *, here: bool = False) -> Tensor:
    """What a net says of fixed random inputs: one of eri, or one of diffusers."""
    draws = torch.Generator().manual_seed(7)
    x, t = torch.randn(2, 4, 16, 8, generator=draws), torch.tensor([20, 901])
    if family == "sd21":
        context = torch.randn(2, 77, 64, generator=draws)
        return unet(x, t, context) if here else unet(x, t, context).sample
    context = torch.randn(2, 77, 128, generator=draws)
    pooled = torch.randn(2, 64, generator=draws)
    ids = torch.tensor([[1024, 768, 0, 128, 1024, 1024], [512, 512, 7, 0, 640, 384]])
    if here:
        return unet(x, t, context, pooled, ids)
    return unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample


@cache
def computed_here(model: Path, adapter: Path) -> Tensor:
    unet = load_unet(model)
    load_adapter(unet, adapter)
    return computed(unet, unet.spec.family, here=True)


def in_diffusers(run: Run, adapter: Path | None) -> Tensor:
    run.pipeline.unet = UNet2DConditionModel.from_pretrained(run.base / "unet")
    if adapter is not None:
        run.pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    return computed(run.pipeline.unet, run.plan.family)


def in_peft(run: Run, adapter: Path) -> Tensor:
    unet = UNet2DConditionModel.from_pretrained(run.base / "unet")
    return computed(PeftModel.from_pretrained(unet, str(adapter)), run.plan.family)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_diffusers_computes_the_same_with_the_finished_file(run: Run) -> None:
    expected = in_diffusers(run, run.adapter)
    assert difference(computed_here(run.model, run.adapter), expected) < 1e-5
    assert difference(in_diffusers(run, None), expected) > 1e-2


def test_a_wrong_alpha_in_the_file_is_seen(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    run, wrong = run_of("sdxl"), tmp_path / "wrong.safetensors"
    tensors = load_file(run.adapter)
    alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert len(alphas) == 192
    assert {alpha.item() for alpha in alphas.values()} == {ALPHA}
    save_file(tensors | {name: alpha * 1.01 for name, alpha in alphas.items()}, wrong)
    assert difference(in_diffusers(run, wrong), computed_here(run.model, run.adapter)) > 1e-4


@pytest.mark.parametrize(
    ("name", "dialect", "precision"),
    [
        ("sdxl", "kohya", "fp32"),
        ("sdxl", "diffusers", "fp16"),
        ("sdxl", "peft", "fp32"),
        ("sd21", "diffusers", "fp32"),
    ],
)
def test_an_export_is_the_same_adapter_elsewhere(
    run_of: Callable[[str], Run], tmp_path: Path, name: str, dialect: str, precision: str
) -> None:
    run, output = run_of(name), tmp_path / ("folder" if dialect == "peft" else "a.safetensors")
    command = ["export-lora", run.folder, "-o", output, "--format", dialect, "--dtype", precision]
    app([str(word) for word in command], standalone_mode=False)
    there = in_peft(run, output) if dialect == "peft" else in_diffusers(run, output)
    assert difference(computed_here(run.model, run.adapter), there) < 1e-5
    assert difference(computed_here(run.model, output), there) < 1e-5


# ------------------------------------------------------------------ what the run leaves behind


def test_it_is_measured_and_drawn_before_and_after(run: Run) -> None:
    pictures = [np.array(Image.open(run.folder / f"samples/{step:06}-1.png")) for step in (0, 2)]
    assert all(picture.shape == (64, 64, 3) and picture.std() > 1 for picture in pictures)
    assert not np.array_equal(*pictures)
    assert (run.folder / "samples" / "before-after.png").is_file()
    assert "held-out loss" in run.said


FIRST_PARTS = {"sdxl": {"input", "middle", "output"}, "sd21": {"down", "mid", "up"}}


def test_the_file_says_what_it_is_of_and_nothing_of_the_data(run: Run, tmp_path: Path) -> None:
    exported = tmp_path / "exported.safetensors"
    export(run.folder, exported, dialect="diffusers", precision="fp16", overwrite=False)
    shared = {"ss_network_dim": str(RANK), "ss_network_alpha": "2", "ss_steps": str(STEPS)}
    told = run.plan.told | shared | {"ss_sd_model_name": run.model.name}
    for file in (run.adapter, exported):
        assert told.items() <= read_header(file).metadata.items()
        content = file.read_bytes()
        assert b"disc 0" not in content
        assert not any(str(path.parent).encode() in content for path in (run.model, run.folder))


def test_modules_and_numbers_are_as_kohya_writes_them(run: Run) -> None:
    tensors = read_header(run.adapter).tensors
    first = {name.removeprefix("lora_unet_").split("_")[0] for name in tensors}
    assert first == FIRST_PARTS[run.plan.family]
    matrices = {info.dtype for name, info in tensors.items() if not name.endswith(".alpha")}
    assert matrices == {"F16"}


# -------------------------------------------------------------------------- how a run goes on


def test_the_same_command_on_a_finished_run_trains_nothing(
    run_of: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("sdxl")
    before = digest(run.folder)
    times = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.name != "run.lock"}
    app(train_words(run.config, run.settings), standalone_mode=False)
    assert f"this run is finished: {STEPS} steps are done" in capsys.readouterr().out
    assert digest(run.folder) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_stopped_run_goes_on_bit_by_bit(
    run_of: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, output = run_of("sdxl"), tmp_path / "disc"
    settings = [*straight.settings, f"output={output}"]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            in_this_process(straight.config, settings)
    assert steps_in_log(output) == [1]
    assert digest(output) != digest(straight.folder)
    assert "going on from step 1" in in_this_process(straight.config, settings)
    assert steps_in_log(output) == [1, 2, 3]
    assert digest(output) == digest(straight.folder)
    assert (output / "disc.safetensors").read_bytes() == straight.adapter.read_bytes()
