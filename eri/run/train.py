"""`eri train`: a config to a finished adapter, and on from wherever an earlier try got to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from PIL import Image
from rich.console import Console

from eri.config import Config, dump_config
from eri.diffusion import NoiseSchedule
from eri.errors import EriError, MemoryLimitError
from eri.files import atomic_write
from eri.formats.metadata import Folder, adapter_metadata, data_metadata
from eri.models.unet import UNet
from eri.run import checkpoints
from eri.run.adapter_files import CONFIG, finished_adapter, is_finished, shapes_of
from eri.run.backend import start_backend
from eri.run.base import BaseFacts, look_at
from eri.run.clock import Clock
from eri.run.dataset import Images, look_at_images
from eri.run.device import unusable_card
from eri.run.encoding import Encoder
from eri.run.folder import hold
from eri.run.halving import Halving
from eri.run.identity import identity_of, made_with, resolved
from eri.run.loader import Loader, worker_count
from eri.run.memory import memory_errors
from eri.run.micro_batch import Sample
from eri.run.parts import Encoded, Parts, build, encode
from eri.run.plan import RunPlan, plan_run
from eri.run.prediction import Choice, Subjects, choose, recorded, schedule_of, settle
from eri.run.rates import remember_rate
from eri.run.samples import Steps
from eri.run.saves import Saves
from eri.run.stop import StopSignals
from eri.run.validation import Validation
from eri.train import Log, cut, say
from eri.train import train as train_loop

__all__ = ["train", "train_held"]

Found = TypeVar("Found")


def train(
    config: Config,
    console: Console,
    *,
    dry_run: bool = False,
    restart: bool = False,
    allow_change: frozenset[str] = frozenset(),
) -> None:
    """Train a LoRA, or go on with a run that was not finished.

    Args:
        config: the settings.
        console: where people read.
        dry_run: check everything, tell the plan, and stop.
        restart: begin anew, in a new folder beside the old run.
        allow_change: settings that may differ from those that the run began with.

    Raises:
        EriError: see its tree.
        Stopped: the run was asked to stop, and its state is saved.
    """
    with hold(config, restart=restart, dry_run=dry_run) as (held, stop):
        train_held(held, console, stop, dry_run=dry_run, allow_change=allow_change)


def train_held(
    config: Config,
    console: Console,
    stop: StopSignals,
    *,
    dry_run: bool = False,
    allow_change: frozenset[str] = frozenset(),
) -> None:
    """Train in a place that `hold` gave."""
    stop.raise_if_stopped()
    unusable = unusable_card()
    if unusable is not None:
        say(console, "warning: {}\nhint: {}".format(*unusable))
    clock = Clock()
    with memory_errors():
        facts = look_at(config.model, lambda line: say(console, line))
        choice = choose(config.model, facts.hint)
        with clock("checking images"):
            images = look_at_images(config, facts, console, stop.raise_if_stopped)
        checkpoint = checkpoints.newest(config.output, lambda line: say(console, line))
        before = None if checkpoint is None else checkpoint.made_with
        done = 0 if checkpoint is None else checkpoint.step
        with clock("planning"):
            plan = plan_run(
                config, facts, choice, images, dry_run=dry_run, made_with=before, done=done
            )
        run = _Run(config, console, facts, images, plan, clock=clock)
        run.look_back(checkpoint, allow_change)
        if not dry_run and not run.go(checkpoint, stop):
            stop.raise_if_stopped()


class _Run:
    """One session of work on a run folder, which the caller has locked."""

    def __init__(
        self,
        config: Config,
        console: Console,
        facts: BaseFacts,
        images: Images,
        plan: RunPlan,
        *,
        clock: Clock,
    ) -> None:
        self.config = config
        self.folder = config.output
        self.console = console
        self.facts = facts
        self.images = images
        self.plan = plan
        self.choice = plan.choice
        self.resumed = False
        self.clock = clock
        self.layers = shapes_of(facts.spec)
        self.made_with = made_with(plan.device) | plan.memory.record
        self.saves = Saves(
            folder=self.folder,
            keep=config.save.keep,
            layers=self.layers,
            made_with=self.made_with,
            say=self.say,
        )
        with clock("hashing the model"):
            self.identity = identity_of(config, facts, images, plan)

    def say(self, text: str) -> None:
        """Print lines for people."""
        say(self.console, text)

    def look_back(
        self, checkpoint: checkpoints.Checkpoint | None, allow_change: frozenset[str]
    ) -> None:
        """Tell the plan, and what has changed since an earlier session; nothing is written.

        Raises:
            ConfigError: that session had other settings.
        """
        self.say("\n".join(self.plan.lines))
        if checkpoint is not None:
            self.resumed = True
            self._take(recorded(self.choice, checkpoint.identity))
            changed = checkpoints.refuse_changes(
                checkpoint,
                self.identity,
                allow_change,
                made_with=self.made_with,
                exact=self.config.train.deterministic,
            )
            if changed:
                self.say(f"note: not bit by bit the same from here: {'; '.join(changed)}")

    def _take(self, choice: Choice) -> None:
        """Take the base model for this from now on."""
        self.choice = choice
        self.identity |= choice.identity

    def go(self, checkpoint: checkpoints.Checkpoint | None, stop: StopSignals) -> bool:
        """Train until the end or until asked to stop.

        Returns:
            Whether the run is finished.
        """
        if checkpoint is not None and is_finished(self.folder, checkpoint, self.plan.loop.steps):
            self._tell_finished(checkpoint.step)
            return True
        checkpoints.set_aside(self.folder, checkpoint)
        self.plan.space.require()
        self._write_config()
        with self.clock("kernels"):
            start_backend(self.config.train.backend, self.plan.device, self.say)
        encoder = Encoder(
            self.facts,
            dtype=self.plan.dtype,
            device=self.plan.device,
            console=self.console,
            check_stop=stop.raise_if_stopped,
            memory=self.plan.memory,
        )
        with self.clock("caching"):
            encoded = encode(self.config, self.plan, self.images, encoder)
        with self._loader(encoded, 0 if checkpoint is None else checkpoint.step) as batches:
            return self._go_on(encoded, checkpoint, batches, stop)

    def _loader(self, encoded: Encoded, step: int) -> Loader:
        """What reads the steps; it begins before the U-Net loads, and is ready when that is."""
        train = self.config.train
        return Loader(
            Steps(encoded.samples, self.plan.batches, train.accumulate, self.plan.memory.micro),
            steps=range(step, self.plan.loop.steps),
            workers=worker_count(train.workers, self.plan.device),
            device=self.plan.device,
            say=self.say,
        )

    def _go_on(
        self,
        encoded: Encoded,
        checkpoint: checkpoints.Checkpoint | None,
        batches: Loader,
        stop: StopSignals,
    ) -> bool:
        with self.clock("loading"):
            parts = build(
                self.config, self.plan, self.facts, encoded, settle=self._settle, say=self.say
            )
        examples = self.images.examples(self.plan.size)  # now: hours later they may be gone
        loop, numbers = self.plan.loop, parts.state.flat.master.numel()
        if checkpoint is not None:
            checkpoints.load(checkpoint, parts.state, parts.adapter, self.layers)
            self.say(f"going on from step {checkpoint.step}")
            self.saves.make_up(parts.state, parts.adapter, self._metadata(checkpoint.step))
        left = loop.steps - parts.state.step
        self.saves.require_space(numbers, steps=left, every=loop.save_every)
        self._train(parts, batches, stop)
        finished = not stop() and self._finish(parts, examples, stop)
        if not finished:
            where = f"step {parts.state.step} of {self.plan.loop.steps}"
            self.say(f"stopped at {where}; eri train {self.folder / CONFIG} goes on from there")
        return finished

    def _write_config(self) -> None:
        """Write the settings, and what was measured of the model once it is known."""
        with atomic_write(self.folder / CONFIG) as file:
            file.write(dump_config(resolved(self.config, self.plan, self.choice)).encode())

    def _settle(self, unet: UNet, samples: Sequence[Sample]) -> NoiseSchedule:
        """What the base model was trained for: remembered, or measured when the run begins."""
        if not (self.resumed and self.choice.settled):
            found = settle(
                self.choice,
                Subjects(unet, samples),
                self.facts.noise,
                at_once=self.plan.memory.without_gradients,
                where=self.facts.path,
                say=self.say,
            )
            self._take(found)
            self._write_config()
        return schedule_of(self.facts.noise, self.choice)

    def _train(self, parts: Parts, batches: Loader, stop: Callable[[], bool]) -> None:
        state = parts.state
        log_file = self.folder / "log.jsonl"
        cut(log_file, state.step)
        if self.images.validation.items:
            before = self._beside(parts, "validation", self._validation(parts).before)
            if before is not None:
                self.say(f"held-out loss {before.mean:.4f} at the start")
        if self.plan.loop.sample_every and state.step == 0:
            self.say("drawing the previews of the base model")
            self._draw(parts, 0, stop)

        steps = self.plan.loop.steps
        with Log(log_file, steps=steps, step=state.step, console=self.console) as log:
            with self.clock("training"), self._with_last_good():
                train_loop(
                    self.plan.loop,
                    state,
                    step=self._halving(parts),
                    batches=batches,
                    log=log,
                    sample=lambda step: self._draw(parts, step, stop),
                    save=lambda: self._save(parts),
                    stop=stop,
                )
        if parts.step.graphs is not None:
            self.clock.move(parts.step.graphs.seconds, "training", "recording")
        self.clock.move(log.waited, "training", "waiting for samples")
        remember_rate(self.plan.pace, log.images_per_second)

    def _validation(self, parts: Parts) -> Validation:
        images = self.images.validation.fingerprint
        return Validation(self.folder, parts, images, at_once=self.plan.memory.without_gradients)

    def _halving(self, parts: Parts) -> Halving:
        memory = self.plan.memory

        def halved(at_once: int) -> None:
            self.made_with |= replace(memory, halved=at_once).record

        return Halving(
            parts.step, mode=memory.mode, at_once=memory.halved, say=self.say, halved=halved
        )

    @contextmanager
    def _with_last_good(self) -> Iterator[None]:
        """What ends training names the checkpoint that the same command goes on from."""
        try:
            with memory_errors():
                yield
        except EriError as error:
            last = checkpoints.newest(self.folder)
            good = "nothing is saved" if last is None else f"{last.path.name} is the last good one"
            error.hint = good if error.hint is None else f"{error.hint}; {good}"
            raise

    def _beside(self, parts: Parts, what: str, work: Callable[[], Found]) -> Found | None:
        """Do what a run does beside training; without memory for it, warn and go on without."""
        with suppress(MemoryLimitError), memory_errors(), self.clock(what), parts.workspace():
            return work()
        parts.step.make_room()
        self.say(f"warning: step {parts.state.step}: {what} left out: out of memory")
        return None

    def _draw(self, parts: Parts, step: int, stop: Callable[[], bool]) -> None:
        self._beside(parts, "previews", lambda: parts.previews.draw(step, stop))

    def _save(self, parts: Parts) -> None:
        """Write the state and an adapter of this step, then delete old states."""
        metadata = self._metadata(parts.state.step)
        with self.clock("saving"):
            self.saves.save(parts.state, parts.adapter, identity=self.identity, metadata=metadata)

    def _finish(
        self, parts: Parts, examples: Sequence[Image.Image], stop: Callable[[], bool]
    ) -> bool:
        """Measure and show what was learned, then write the finished adapter, last of all."""
        step = parts.state.step
        if self.images.validation.items:
            compared = self._beside(parts, "validation", self._validation(parts).compare)
            if compared is not None:
                self.say(compared)
        sheet = None
        if self.plan.loop.sample_every:
            sheet = self._beside(
                parts, "previews", lambda: parts.previews.sheet(step, examples, stop)
            )
            if sheet is None and stop():
                return False
        path = finished_adapter(self.folder)
        with self.clock("saving"):
            self.saves.write(parts.adapter, path, self._metadata(step))
        self.say(f"time     {self.clock.told()}")
        self.say(f"adapter  {path}")
        if sheet is not None:
            self.say(f"picture  {sheet}")
        return True

    def _metadata(self, step: int) -> dict[str, str]:
        metadata = adapter_metadata(
            family=self.facts.spec.family,
            rank=self.config.adapter.rank,
            alpha=self.config.adapter.alpha,
            name=finished_adapter(self.folder).stem,
            steps=step,
            resolution=self.images.train.resolution,
            prediction=self.choice.prediction,
            zero_terminal_snr=self.choice.zero_terminal_snr,
            base=self.facts.name,
            clip_skip=self.config.model.clip_skip,
            trigger_phrase=self._trigger_phrase(),
        )
        if self.config.save.metadata == "full":
            metadata |= data_metadata(self.config.model.path, self._folders())
        return metadata

    def _trigger_phrase(self) -> str | None:
        """What is set, else the trigger words of the images."""
        words = dict.fromkeys(
            source.caption.trigger
            for source in self.config.data
            if source.caption.trigger and not source.regularization
        )
        return self.config.save.trigger_phrase or ", ".join(words) or None

    def _folders(self) -> list[Folder]:
        """What the adapter's file tells of each folder of images."""
        captions: list[list[str]] = [[] for _ in self.config.data]
        for item in self.images.train.items:
            captions[item.source].append(item.captions[0])
        return [
            Folder(str(source.path), source.repeats, source.regularization, texts)
            for source, texts in zip(self.config.data, captions, strict=True)
        ]

    def _tell_finished(self, done: int) -> None:
        wanted = self.plan.loop.steps
        asked = "" if done == wanted else f" and train.steps asks for {wanted}"
        self.say(f"this run is finished: {done} steps are done{asked}; nothing to train")
        self.say(f"adapter  {finished_adapter(self.folder)}")
        train = self.config.train
        if train.epochs is not None:
            self.say("hint: --restart, with more train.epochs, begins anew beside it")
        elif train.schedule == "constant":
            self.say(f"hint: train.steps above {done} trains on; --restart begins anew beside it")
        else:  # whose rate depends on the last step
            self.say(f"hint: --restart, with train.steps above {done}, begins anew beside it")
