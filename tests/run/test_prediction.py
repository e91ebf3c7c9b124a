"""Who is believed about what a base model predicts: settings, files, a measurement, the default."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eri.config import ModelSource
from eri.diffusion import NoiseSchedule
from eri.errors import ConfigError, ModelError
from eri.formats.diffusers_folder import STABLE_DIFFUSION_NOISE
from eri.formats.prediction_hints import Hint
from eri.models import load_unet
from eri.run.objective import Sample
from eri.run.prediction import Choice, Subjects, choose, recorded, schedule_of, settle
from eri.run.probe import Subject
from tests.run.test_probe import EPSILON, PLAIN, RESCALED, asked, ideal

WHERE = Path("model\x1b.safetensors")
MARKED = Hint("v_prediction", True, "the file's markers v_pred and ztsnr")
V = Hint("v_prediction", None, "the file's marker v_pred")
PLAIN_V = Hint("v_prediction", False, "its scheduler_config.json")
IS_EPSILON = Hint("epsilon", False, "its scheduler_config.json")

NETS = {"epsilon": ideal(EPSILON, 32), "v": ideal(PLAIN, 32), "v-zero-snr": ideal(RESCALED, 32)}
NETS["neither"] = lambda x, t: 0 * x
NETS["deaf"] = lambda x, t: ideal(PLAIN, 32)(x, 0 * t + 600)  # v, whatever timestep it is told


def model(**keys: Any) -> ModelSource:
    return ModelSource(path="x", **keys)


def taken(choice: Choice) -> tuple[str, bool]:
    return choice.prediction, choice.zero_terminal_snr


def sources(choice: Choice) -> tuple[str, str]:
    return choice.target.source, choice.zero.source


def measured(choice: Choice, net: str) -> tuple[Choice, list[str]]:
    """The choice after the net was asked, and the lines that were printed."""
    said: list[str] = []
    found = settle(
        choice, asked(NETS[net]), STABLE_DIFFUSION_NOISE, at_once=64, where=WHERE, say=said.append
    )
    return found, said


@pytest.mark.parametrize(
    ("keys", "hint", "expected", "by"),
    [
        ({}, None, ("epsilon", False), ("unknown", "unknown")),
        ({}, MARKED, ("v_prediction", True), ("files", "files")),
        ({}, V, ("v_prediction", False), ("files", "unknown")),
        ({}, IS_EPSILON, ("epsilon", False), ("files", "files")),
        ({"prediction": "epsilon"}, MARKED, ("epsilon", False), ("setting", "setting")),
        ({"prediction": "v"}, MARKED, ("v_prediction", True), ("setting", "files")),
        ({"prediction": "v"}, IS_EPSILON, ("v_prediction", False), ("setting", "unknown")),
        ({"prediction": "v"}, None, ("v_prediction", False), ("setting", "unknown")),
        ({"zero_terminal_snr": False}, MARKED, ("v_prediction", False), ("files", "setting")),
        ({"zero_terminal_snr": False}, None, ("epsilon", False), ("unknown", "setting")),
        ({"zero_terminal_snr": True}, None, ("v_prediction", True), ("setting", "setting")),
        ({"zero_terminal_snr": True}, PLAIN_V, ("v_prediction", True), ("files", "setting")),
    ],
)
def test_settings_are_believed_before_files(
    keys: dict[str, Any], hint: Hint | None, expected: tuple[str, bool], by: tuple[str, str]
) -> None:
    choice = choose(model(**keys), hint)
    assert (taken(choice), sources(choice)) == (expected, by)
    assert choice.settled == ("unknown" not in by)


@pytest.mark.parametrize(
    ("keys", "hint", "words"),
    [
        ({"prediction": "epsilon"}, None, r"by model\.prediction"),
        ({"prediction": "epsilon"}, MARKED, r"by model\.prediction"),
        ({}, IS_EPSILON, r"by its scheduler_config\.json"),
    ],
)
def test_epsilon_cannot_have_zero_terminal_snr(
    keys: dict[str, Any], hint: Hint | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        choose(model(zero_terminal_snr=True, **keys), hint)
    assert refused.value.where == "model.zero_terminal_snr"
    assert "model.prediction: v" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("keys", "hint", "line"),
    [
        ({}, None, "prediction not told by the files"),
        ({}, IS_EPSILON, "prediction epsilon: its scheduler_config.json"),
        (
            {},
            MARKED,
            "prediction v with zero-terminal SNR: the file's markers v_pred and ztsnr",
        ),
        (
            {},
            V,
            "prediction v: the file's marker v_pred; zero-terminal SNR: not told by the files",
        ),
        (
            {"prediction": "v", "zero_terminal_snr": True},
            None,
            "prediction v with zero-terminal SNR: model.prediction; "
            "zero-terminal SNR: model.zero_terminal_snr",
        ),
    ],
)
def test_the_choice_and_its_reason_are_one_line(
    keys: dict[str, Any], hint: Hint | None, line: str
) -> None:
    assert choose(model(**keys), hint).line == line


@pytest.mark.parametrize(
    ("net", "expected", "words"),
    [
        ("epsilon", ("epsilon", False), "prediction epsilon: measured, error 0."),
        ("v", ("v_prediction", False), "prediction v: measured, error "),
        ("v-zero-snr", ("v_prediction", True), "prediction v with zero-terminal SNR: measured"),
    ],
)
def test_what_nobody_says_is_measured_and_told(
    net: str, expected: tuple[str, bool], words: str
) -> None:
    found, said = measured(choose(model(), None), net)
    assert taken(found) == expected
    assert sources(found) == ("measured", "measured")
    assert said == [found.line]
    assert found.line.startswith(words)
    assert found.line.count("measured, error") == 1 + (net != "epsilon")  # one for each question


def test_what_is_not_clear_is_the_default_and_says_which_key_sets_it() -> None:
    found, (line,) = measured(choose(model(), None), "neither")
    assert (taken(found), sources(found)) == (("epsilon", False), ("default", "default"))
    assert "error 1 to epsilon and 1 to v" in line
    assert "model.prediction sets it" in line
    found, (line,) = measured(choose(model(), None), "deaf")
    assert (taken(found), sources(found)) == (("v_prediction", False), ("measured", "default"))
    assert "model.zero_terminal_snr sets it" in line
    found, (line,) = measured(choose(model(prediction="v"), None), "neither")
    assert (taken(found), sources(found)) == (("v_prediction", False), ("setting", "default"))


def test_what_the_files_leave_open_is_measured_alone() -> None:
    found, (line,) = measured(choose(model(), V), "v-zero-snr")
    assert (taken(found), sources(found)) == (("v_prediction", True), ("files", "measured"))
    assert line.startswith("prediction v with zero-terminal SNR: the file's marker v_pred; ")


@pytest.mark.parametrize(
    ("hint", "net"), [(MARKED, "v-zero-snr"), (IS_EPSILON, "epsilon"), (MARKED, "neither")]
)
def test_what_the_files_say_and_the_net_does_is_not_told_again(hint: Hint, net: str) -> None:
    choice = choose(model(), hint)
    assert measured(choice, net) == (choice, [])


@pytest.mark.parametrize(
    ("hint", "net", "does"), [(IS_EPSILON, "v", "v"), (MARKED, "epsilon", "epsilon")]
)
def test_files_that_are_clearly_wrong_are_refused(hint: Hint, net: str, does: str) -> None:
    with pytest.raises(ModelError, match=f"but it predicts {does}: measured") as refused:
        measured(choose(model(), hint), net)
    assert refused.value.exit_code == 4
    assert hint.why in refused.value.what
    assert refused.value.where == "model\\x1b.safetensors"
    assert f"model.prediction: {does}" in (refused.value.hint or "")


@pytest.mark.parametrize(("key", "net"), [("epsilon", "v"), ("v", "epsilon")])
def test_a_setting_that_seems_wrong_is_only_warned_of(key: str, net: str) -> None:
    choice = choose(model(prediction=key, zero_terminal_snr=False), None)
    found, said = measured(choice, net)
    assert found == choice
    (line,) = said
    assert line.startswith(f"warning: model.prediction says that the model predicts {key}, but")
    assert f"it predicts {net}: measured, error" in line


@pytest.mark.parametrize(
    ("choice", "net", "words"),
    [
        (choose(model(), MARKED), "v", "v_pred and ztsnr says with"),
        (choose(model(), PLAIN_V), "v-zero-snr", "scheduler_config.json says without"),
        (choose(model(zero_terminal_snr=False), V), "v-zero-snr", "model.zero_terminal_snr says"),
    ],
    ids=["marked", "folder", "setting"],
)
def test_about_zero_terminal_snr_alone_there_is_only_a_warning(
    choice: Choice, net: str, words: str
) -> None:
    found, said = measured(choice, net)
    assert found == choice
    (line,) = said
    assert line.startswith("warning: ")
    assert words in line
    assert line.endswith("hint: model.zero_terminal_snr sets it")


def test_a_resumed_run_remembers_what_it_measured() -> None:
    before, _ = measured(choose(model(), None), "v-zero-snr")
    again = recorded(choose(model(), None), before.identity)
    assert taken(again) == taken(before)
    assert again.identity == before.identity
    assert again.line == "prediction v with zero-terminal SNR: measured when the run began"
    # what the files said then they say still, and the rest is remembered
    before, _ = measured(choose(model(), V), "v-zero-snr")
    again = recorded(choose(model(), V), before.identity)
    assert (taken(again), sources(again)) == (("v_prediction", True), ("files", "measured"))


def test_what_is_known_is_not_taken_from_the_record_so_that_a_change_is_found() -> None:
    remembered = {"model.prediction": "v", "model.zero_terminal_snr": True}
    changed = recorded(choose(model(prediction="epsilon"), None), remembered)
    assert changed.identity == {"model.prediction": "epsilon", "model.zero_terminal_snr": False}
    changed = recorded(choose(model(zero_terminal_snr=False), None), remembered)
    assert changed.identity == {"model.prediction": "v", "model.zero_terminal_snr": False}


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"model.prediction": "auto", "model.zero_terminal_snr": "auto"},
        {"model.prediction": ["v"], "model.zero_terminal_snr": True},
        {"model.prediction": "v", "model.zero_terminal_snr": 1},
    ],
    ids=["old", "auto", "list", "number"],
)
def test_a_record_that_says_nothing_leaves_it_unknown(identity: dict[str, object]) -> None:
    assert not recorded(choose(model(), None), identity).settled


def test_what_was_measured_goes_into_the_settings_and_nothing_else() -> None:
    for choice in (choose(model(), None), choose(model(), MARKED)):
        assert choice.settings(model()) == model()
    found, _ = measured(choose(model(), None), "v-zero-snr")
    written = found.settings(model(vae="y"))
    assert written == model(vae="y", prediction="v", zero_terminal_snr=True)
    again = choose(written, None)
    assert (taken(again), again.identity) == (taken(found), found.identity)
    found, _ = measured(choose(model(), V), "v-zero-snr")
    assert found.settings(model()) == model(zero_terminal_snr=True)
    found, _ = measured(choose(model(), None), "neither")
    assert found.settings(model()) == model()


def test_the_schedule_is_that_of_the_choice() -> None:
    def alphas(schedule: NoiseSchedule) -> torch.Tensor:
        return schedule.alphas_cumprod

    marked = schedule_of(STABLE_DIFFUSION_NOISE, choose(model(), MARKED))
    assert torch.equal(alphas(marked), alphas(RESCALED))
    assert marked.prediction == "v_prediction"
    plain = schedule_of(STABLE_DIFFUSION_NOISE, choose(model(), IS_EPSILON))
    assert torch.equal(alphas(plain), alphas(EPSILON))
    assert plain.prediction == "epsilon"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_runs_images_are_asked_about_with_their_own_conditions(
    family: str, request: pytest.FixtureRequest
) -> None:
    unet = load_unet(request.getfixturevalue(family), dtype=torch.bfloat16)
    spec = unet.spec
    draws = torch.Generator().manual_seed(0)
    normal: Callable[..., torch.Tensor] = partial(torch.randn, generator=draws)
    samples = [
        Sample(
            file=str(n),
            mean=normal(4, 8, 8),
            std=torch.zeros(4, 8, 8),
            context=normal(5, spec.context_dim),
            pooled=None if spec.pooled_dim is None else normal(spec.pooled_dim),
            time_ids=None if spec.pooled_dim is None else torch.arange(6.0) * 100,
        )
        for n in range(2)
    ]
    asked_about = Subjects(unet, samples)
    assert len(asked_about) == 2
    x, t = normal(3, 4, 8, 8), torch.tensor([1, 500, 999])
    with torch.no_grad():
        answers = [subject.predict(x, t) for subject in asked_about]
        alone = asked_about[0].predict(x[1:2], t[1:2])
    first: Subject = asked_about[0]
    assert torch.equal(first.latent, samples[0].mean)
    assert answers[0].shape == x.shape
    assert not torch.equal(answers[0], answers[1])  # other captions
    torch.testing.assert_close(answers[0][1:2], alone, atol=0.05, rtol=0.05)
