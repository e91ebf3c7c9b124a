"""What a model's files say of its training target, and which of two answers is believed."""

from dataclasses import replace

import pytest

from eri.errors import ModelError
from eri.formats.diffusers_folder import NoiseConfig
from eri.formats.header import Header, TensorInfo
from eri.formats.prediction_hints import Hint, file_hint, folder_hint

FOLDER = NoiseConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
)


def header(*tensors: str, **metadata: str) -> Header:
    """A file with a weight, these empty tensors and these keys of the Model Spec."""
    names = ("model.diffusion_model.out.2.bias", *tensors)
    spec = {f"modelspec.{key}": value for key, value in metadata.items()}
    return Header({name: TensorInfo("F32", (0,), 0, 0) for name in names}, spec, 8)


def said(hint: Hint | None) -> tuple[str, bool | None] | None:
    return None if hint is None else (hint.prediction, hint.zero_terminal_snr)


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ((), {}, None),
        (("v_pred",), {}, ("v_prediction", None)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
        (("ztsnr",), {}, ("v_prediction", True)),
        (("model.v_pred", "model.diffusion_model.v_pred"), {}, None),
        ((), {"prediction_type": "epsilon"}, ("epsilon", False)),
        ((), {"prediction_type": "v"}, ("v_prediction", None)),
        ((), {"prediction_type": "sample"}, None),
        ((), {"predict_key": " V "}, ("v_prediction", None)),
        ((), {"predict_key": "epsilon"}, ("epsilon", False)),
        ((), {"architecture": "stable-diffusion-v2-768-v"}, ("v_prediction", None)),
        ((), {"architecture": "stable-diffusion-v2-512"}, ("epsilon", False)),
        ((), {"architecture": "stable-diffusion-xl-v1-base"}, None),
    ],
)
def test_what_a_file_says(
    tensors: tuple[str, ...],
    metadata: dict[str, str],
    expected: tuple[str, bool | None] | None,
) -> None:
    assert said(file_hint(header(*tensors, **metadata), "model.safetensors")) == expected


def test_markers_are_believed_before_metadata_and_the_spec_before_other_keys() -> None:
    patched = header("v_pred", predict_key="epsilon")
    assert said(file_hint(patched, "x")) == ("v_prediction", None)
    both = header(prediction_type="v", predict_key="epsilon")
    assert said(file_hint(both, "x")) == ("v_prediction", None)
    unknown_first = header(prediction_type="flow", architecture="stable-diffusion-v2-768-v")
    assert said(file_hint(unknown_first, "x")) == ("v_prediction", None)


def test_it_is_told_where_it_was_read() -> None:
    def why(hint: Hint | None) -> str:
        assert hint is not None
        return hint.why

    assert why(file_hint(header("v_pred", "ztsnr"), "x")) == "the file's markers v_pred and ztsnr"
    assert why(file_hint(header("v_pred"), "x")) == "the file's marker v_pred"
    assert why(file_hint(header(predict_key="v\n"), "x")).endswith("modelspec.predict_key, v\\x0a")


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("edm_mean", r"Playground v2\.5"),
        ("edm_std", r"Playground v2\.5"),
        ("edm_vpred.sigma_max", "v over the noise of EDM"),
    ],
)
def test_models_of_another_noise_are_refused(marker: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refused:
        file_hint(header("v_pred", marker), "a\x1b.safetensors")
    assert marker in refused.value.what
    assert refused.value.where == "a\\x1b.safetensors"


def test_what_a_folder_says() -> None:
    assert said(folder_hint(FOLDER)) == ("epsilon", False)
    v = replace(FOLDER, prediction_type="v_prediction")
    assert said(folder_hint(v)) == ("v_prediction", False)
    assert said(folder_hint(replace(v, rescale_betas_zero_snr=True))) == ("v_prediction", True)
    assert folder_hint(v).why == "its scheduler_config.json"


def test_a_folder_cannot_have_been_trained_on_the_noise_with_zero_terminal_snr() -> None:
    hint = folder_hint(replace(FOLDER, rescale_betas_zero_snr=True))
    assert said(hint) == ("epsilon", False)
    assert "rescale_betas_zero_snr needs v" in hint.why
