"""What a model's files say of its training target: ε or v, and with zero terminal SNR or not.

Weights do not tell, so authors and tools leave notes: a tensor whose name is the message, text in
the header, a scheduler's config. They can be wrong or missing; whoever uses them should measure.
"""

from dataclasses import dataclass

from eri.errors import ModelError
from eri.formats.diffusers_folder import NoiseConfig, Prediction
from eri.formats.header import Header
from eri.printable import printable

__all__ = ["Hint", "file_hint", "folder_hint"]

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
EDM_MARKERS = {
    "edm_mean": "the noise of EDM, as Playground v2.5 does",
    "edm_std": "the noise of EDM, as Playground v2.5 does",
    "edm_vpred.sigma_max": "v over the noise of EDM",
    "edm_vpred.sigma_min": "v over the noise of EDM",
}
SAID: dict[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction"}
ARCHITECTURES: dict[str, Prediction] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}


@dataclass(frozen=True)
class Hint:
    """What the files say.

    Attributes:
        prediction: what the net predicts.
        zero_terminal_snr: whether its last timestep is pure noise; None: not said.
        why: where it is said, in words; fit to print.
    """

    prediction: Prediction
    zero_terminal_snr: bool | None
    why: str


def file_hint(header: Header, where: object) -> Hint | None:
    """What a safetensors file says, by its markers or else by its metadata.

    Markers are tensors of the top level whose values do not matter. They are believed first: an
    author puts them there on purpose, while ComfyUI writes `predict_key: epsilon` for a v model
    whose sampling was patched to v before it was saved.

    Args:
        header: of the file.
        where: the file, for the message.

    Raises:
        ModelError: it is a model of EDM's noise, which is not supported.
    """
    found = next((name for name in EDM_MARKERS if name in header.tensors), None)
    if found is not None:
        raise ModelError(
            f"this model predicts {EDM_MARKERS[found]}; its marker is the tensor {found}",
            where=printable(str(where)),
            hint="models that predict ε or v over the noise of Stable Diffusion can be trained",
        )
    return _marked(header) or _told(header.metadata)


def folder_hint(noise: NoiseConfig) -> Hint:
    """What the scheduler's config in a diffusers folder says; what it leaves out has a default."""
    why = "its scheduler_config.json"
    if noise.prediction_type == "epsilon" and noise.rescale_betas_zero_snr:
        # samplers take both, for darker pictures; nothing can have been trained so
        return Hint("epsilon", False, f"{why}, whose rescale_betas_zero_snr needs v")
    return Hint(noise.prediction_type, noise.rescale_betas_zero_snr, why)


def _marked(header: Header) -> Hint | None:
    """Without `ztsnr` nothing is said of zero SNR: ComfyUI re-saves a v model with `v_pred` only.

    `ztsnr` alone says v as well, for nothing else can be trained so.
    """
    found = [name for name in (V_MARKER, ZERO_SNR_MARKER) if name in header.tensors]
    if not found:
        return None
    many = "s" if len(found) > 1 else ""
    zero = True if ZERO_SNR_MARKER in found else None
    return Hint("v_prediction", zero, f"the file's marker{many} {' and '.join(found)}")


def _told(metadata: dict[str, str]) -> Hint | None:
    """The first of three keys whose value is known; any other value says nothing."""
    for key, values in (
        ("modelspec.prediction_type", SAID),
        ("modelspec.predict_key", SAID),
        ("modelspec.architecture", ARCHITECTURES),
    ):
        prediction = values.get(metadata.get(key, "").strip().lower())
        if prediction is not None:
            zero = False if prediction == "epsilon" else None
            return Hint(prediction, zero, f"the file's {key}, {printable(metadata[key], 60)}")
    return None
