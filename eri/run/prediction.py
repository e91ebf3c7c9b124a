"""What the base model's U-Net predicts, ε or v, and over which schedule: said, or else measured.

A setting is believed before the files, the files before a measurement, and that before the default.
The measurement is taken all the same: a LoRA that was trained for the other target is worthless,
and nothing would tell before the previews do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from torch import Tensor

from eri.config import ModelSource
from eri.diffusion import NoiseSchedule, Prediction
from eri.errors import ConfigError, ModelError
from eri.formats.diffusers_folder import NoiseConfig
from eri.formats.prediction_hints import Hint
from eri.models.unet import UNet
from eri.printable import printable
from eri.run.micro_batch import Sample
from eri.run.objective import conditions_of
from eri.run.probe import Subject, probe_prediction, probe_zero_snr

__all__ = ["Choice", "Fact", "Subjects", "choose", "recorded", "schedule_of", "settle"]

Source = Literal["setting", "files", "measured", "default", "unknown"]
"""Who says it; `default`: it was measured and was not clear; `unknown`: nobody has said it yet."""

Value = TypeVar("Value")

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction"}
NAMES = {prediction: name for name, prediction in PREDICTIONS.items()}
PREDICTION_KEY, ZERO_SNR_KEY = "model.prediction", "model.zero_terminal_snr"
ZERO_SNR = "zero-terminal SNR"
UNTOLD = "not told by the files"


@dataclass(frozen=True)
class Fact(Generic[Value]):
    """Something about the model, who says it, and the reason in words."""

    value: Value
    source: Source
    why: str


@dataclass(frozen=True)
class Choice:
    """What a run takes the base model for.

    Attributes:
        target: what the net predicts.
        zero: whether its last timestep is pure noise; with v alone.
    """

    target: Fact[Prediction]
    zero: Fact[bool]

    @property
    def prediction(self) -> Prediction:
        """What the net predicts."""
        return self.target.value

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return self.zero.value

    @property
    def settled(self) -> bool:
        """Whether nothing is left to find out."""
        return "unknown" not in (self.target.source, self.zero.source)

    @property
    def line(self) -> str:
        """What is chosen and why, for people."""
        if self.target.source == "unknown":
            return f"prediction {self.target.why}"
        name = NAMES[self.prediction] + (f" with {ZERO_SNR}" if self.zero_terminal_snr else "")
        same = self.zero.why == self.target.why
        return f"prediction {name}: {self.target.why}" + (
            "" if same else f"; {ZERO_SNR}: {self.zero.why}"
        )

    @property
    def identity(self) -> dict[str, object]:
        """The settings that say the same; a part of what makes the numbers of a run."""
        return {PREDICTION_KEY: NAMES[self.prediction], ZERO_SNR_KEY: self.zero_terminal_snr}

    def settings(self, model: ModelSource) -> ModelSource:
        """The model's settings, and what was measured written in for whoever reads them later."""
        update: dict[str, object] = {}
        if self.target.source == "measured":
            update["prediction"] = NAMES[self.prediction]
        if self.zero.source == "measured":
            update["zero_terminal_snr"] = self.zero_terminal_snr
        return model.model_copy(update=update)


def choose(model: ModelSource, hint: Hint | None) -> Choice:
    """What the settings and the files say; what they do not is unknown, till then ε and False.

    Raises:
        ConfigError: zero-terminal SNR is asked for, of a model that predicts ε.
    """
    target = _target(model, hint)
    zero = _zero(model, hint, target)
    if zero.value and target.value == "epsilon":
        raise ConfigError(
            f"a model that predicts epsilon cannot have {ZERO_SNR}, whose last timestep would tell "
            f"it nothing of the image; epsilon is said by {target.why}",
            where=ZERO_SNR_KEY,
            hint=f"leave it auto, or set {PREDICTION_KEY}: v if that is what the model predicts",
        )
    return Choice(target, zero)


def _target(model: ModelSource, hint: Hint | None) -> Fact[Prediction]:
    if model.prediction != "auto":
        return Fact(PREDICTIONS[model.prediction], "setting", PREDICTION_KEY)
    if hint is not None:
        return Fact(hint.prediction, "files", hint.why)
    if model.zero_terminal_snr is True:  # which v alone can have
        return Fact("v_prediction", "setting", ZERO_SNR_KEY)
    return Fact("epsilon", "unknown", UNTOLD)


def _zero(model: ModelSource, hint: Hint | None, target: Fact[Prediction]) -> Fact[bool]:
    if model.zero_terminal_snr != "auto":
        return Fact(model.zero_terminal_snr, "setting", ZERO_SNR_KEY)
    if target.value == "epsilon":
        return _never(target)
    if hint is None or hint.prediction != target.value or hint.zero_terminal_snr is None:
        return Fact(False, "unknown", UNTOLD)
    return Fact(hint.zero_terminal_snr, "files", hint.why)


def _never(target: Fact[Prediction]) -> Fact[bool]:
    """No zero-terminal SNR, because the net predicts ε."""
    return Fact(False, target.source, target.why)


def recorded(choice: Choice, identity: Mapping[str, object]) -> Choice:
    """A choice of which the unknown is taken from what a checkpoint remembers of its run.

    What is known stays, so that a setting that has changed since then is found to have changed.
    """
    name, zero = identity.get(PREDICTION_KEY), identity.get(ZERO_SNR_KEY)
    if not isinstance(name, str) or name not in PREDICTIONS or not isinstance(zero, bool):
        return choice
    why = "measured when the run began"
    if choice.target.source == "unknown":
        choice = replace(choice, target=Fact(PREDICTIONS[name], "measured", why))
    if choice.zero.source == "unknown":
        zero = zero and choice.prediction != "epsilon"
        choice = replace(choice, zero=Fact(zero, "measured", why))
    return choice


def schedule_of(noise: NoiseConfig, choice: Choice) -> NoiseSchedule:
    """The noise schedule of a base model that is taken for this."""
    return _schedule(noise, choice.prediction, choice.zero_terminal_snr)


def _schedule(noise: NoiseConfig, prediction: Prediction, zero_terminal_snr: bool) -> NoiseSchedule:
    return NoiseSchedule(
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        beta_schedule=noise.beta_schedule,
        timesteps=noise.num_train_timesteps,
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
    )


class Subjects(Sequence[Subject]):
    """A run's images to ask its U-Net about; a latent is read when it is asked for."""

    def __init__(self, unet: UNet, samples: Sequence[Sample]) -> None:
        self.unet = unet
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Subject:  # type: ignore[override]  # no slices
        unet, sample = self.unet, self.samples[index]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            conditions = conditions_of(unet, [sample] * len(x))
            return unet(x.to(unet.device, unet.dtype), t.to(unet.device), *conditions).cpu()

        return Subject(sample.mean, predict)


def settle(
    choice: Choice,
    subjects: Sequence[Subject],
    noise: NoiseConfig,
    *,
    at_once: int,
    where: Path,
    say: Callable[[str], None],
) -> Choice:
    """Measure the base model, find out what is unknown, and object to what is clearly not so.

    Args:
        choice: what the settings and the files say.
        subjects: images to ask the base model about, without an adapter's influence.
        noise: the schedule that its files tell.
        at_once: samples in a forward pass, at most.
        where: the model, for messages.
        say: prints a line.

    Returns:
        A choice in which nothing is unknown.

    Raises:
        ModelError: the files say what the net clearly does not do.
        NonFiniteError: its answers are not finite.
    """
    plain = _schedule(noise, "v_prediction", zero_terminal_snr=False)
    verdict = probe_prediction(subjects, plain, at_once=at_once)
    found = choice
    if choice.target.source == "unknown":
        found = _with_target(choice, verdict.answer, verdict.words)
    elif verdict.answer not in (None, choice.prediction):
        _object(choice.target, NAMES[verdict.answer], verdict.words, where=where, say=say)
    if found.prediction == verdict.answer == "v_prediction":
        rescaled = _schedule(noise, "v_prediction", zero_terminal_snr=True)
        verdict = probe_zero_snr(subjects, plain, rescaled, at_once=at_once)
        found = _with_zero(found, verdict.answer, verdict.words, say)
    elif found.zero.source == "unknown":
        found = _with_zero(found, None, verdict.words, say)
    if not choice.settled:
        say(found.line)
    return found


def _with_target(choice: Choice, answer: Prediction | None, words: str) -> Choice:
    target: Fact[Prediction] = Fact("epsilon", "default", _unclear(words, PREDICTION_KEY))
    if answer is not None:
        target = Fact(answer, "measured", f"measured, {words}")
    unknown = choice.zero.source == "unknown"
    derived = unknown and target.value == "epsilon"
    return Choice(target, _never(target) if derived else choice.zero)


def _with_zero(
    choice: Choice, answer: bool | None, words: str, say: Callable[[str], None]
) -> Choice:
    if choice.zero.source == "unknown":
        if answer is None:
            return replace(choice, zero=Fact(False, "default", _unclear(words, ZERO_SNR_KEY)))
        return replace(choice, zero=Fact(answer, "measured", f"measured, {words}"))
    if answer not in (None, choice.zero_terminal_snr):
        # Not refused as a wrong prediction is: the schedules are alike but for the last timesteps,
        # so that little is lost, and what is measured is a small difference, on images that may be
        # foreign to the model.
        say(
            f"warning: {choice.zero.why} says {_which(choice.zero_terminal_snr)}; measured, the "
            f"model seems to have been trained {_which(not choice.zero_terminal_snr)}: {words}\n"
            f"hint: {ZERO_SNR_KEY} sets it"
        )
    return choice


def _object(
    target: Fact[Prediction], answer: str, words: str, *, where: Path, say: Callable[[str], None]
) -> None:
    """Refuse what the files say; a setting is only warned of, for someone has thought about it."""
    what = f"{target.why} says that the model predicts {NAMES[target.value]}, but it predicts"
    if target.source == "setting":
        say(f"warning: {what} {answer}: measured, {words}")
        return
    raise ModelError(
        f"{what} {answer}: measured, {words}",
        where=printable(where),
        hint=f"set {PREDICTION_KEY}: {answer}, or {NAMES[target.value]} if you know better",
    )


def _unclear(words: str, key: str) -> str:
    return f"not told by the files and not clear when measured, {words}; {key} sets it"


def _which(zero_terminal_snr: bool) -> str:
    return f"{'with' if zero_terminal_snr else 'without'} {ZERO_SNR}"
