"""The bundled model and images are what they are said to be, and the road over them is whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eri.adapters import attach
from eri.config import load_config
from eri.data import scan
from eri.formats.adapter_file import Dialect, write_adapter
from eri.models import load_unet
from eri.run.base import look_at
from eri.run.train import train
from tests.run.conftest import Screen

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "eri" / "demo"
MODEL = DEMO / "model"
MEBIBYTES = 2**20


def relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


def test_the_model_is_small_whole_and_of_stable_diffusions_topology() -> None:
    weights = list(MODEL.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 16 * MEBIBYTES
    facts = look_at("demo")
    assert (facts.spec.family, facts.resolution, facts.noise.prediction_type) == (
        *("sd15", 128),
        "epsilon",
    )
    assert len(attach(load_unet(MODEL), rank=1).layers) == 192


def test_licences_and_cards_lie_beside_the_files() -> None:
    assert "SIL OPEN FONT LICENSE" in (DEMO / "OFL-1.1.txt").read_text(encoding="utf-8").upper()
    for card in (DEMO / "README.md", MODEL / "README.md"):
        assert "Noto Color Emoji" in card.read_text(encoding="utf-8")


def test_the_net_computes_what_diffusers_computes() -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32)
    x, t = torch.randn(2, 4, 16, 24), torch.tensor([20, 980])
    context = torch.randn(2, 77, theirs.config["cross_attention_dim"])
    with torch.no_grad():
        assert relative(load_unet(MODEL)(x, t, context), theirs(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_an_adapter_does_in_diffusers_what_it_does_here(dialect: Dialect, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    ours = load_unet(MODEL)
    adapter = attach(ours, rank=4, alpha=2)
    for name, parameter in adapter.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if "lora_b" in name else 0.2)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter.pairs(), path, dialect=dialect, dtype=torch.float32, metadata={})
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL).to(torch.float32)
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([600]), torch.randn(1, 77, 128)
    context = context[..., : ours.spec.context_dim]
    with torch.no_grad():
        expected, base = ours(x, t, context), load_unet(MODEL)(x, t, context)
        pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
        found = pipeline.unet(x, t, context).sample
    assert relative(found, expected) < 1e-5
    assert relative(found, base) > 0.05  # the adapter matters


def test_the_images_are_captioned_small_and_apart_from_the_held_out_ones() -> None:
    source = load_config(ROOT / "configs" / "quickstart.yaml").data[0]
    training = scan([source.model_copy(update={"path": DEMO / "data"})]).items
    held_out = scan([source.model_copy(update={"path": DEMO / "validation"})]).items
    assert 20 <= len(training) <= 40
    assert len(held_out) >= 4
    assert not {item.sha256 for item in training} & {item.sha256 for item in held_out}
    assert not {item.captions[0] for item in training} & {item.captions[0] for item in held_out}
    assert all(item.path.stat().st_size <= 16_000 for item in (*training, *held_out))


def test_quickstart_learns_from_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("configs/quickstart.yaml", ["train.steps=12", "sample.every=0"])
    screen = Screen()
    train(config.model_copy(update={"output": tmp_path / "quick"}), screen.console)
    told = next(line for line in screen.text.splitlines() if "before" in line)
    change = float(told.partition("(")[2].partition(" %")[0])
    assert change < -2


def test_the_command_runs_from_any_config_that_is_shipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "eri", "train", "configs/quickstart.yaml"),
            *("--set", f"output={tmp_path / 'quick'}", "--dry-run"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "model    demo: sd15" in done.stdout
