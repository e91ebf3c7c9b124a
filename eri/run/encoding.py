"""Images and prompts to what the U-Net is given, once: kept in the cache, and read from there.

The VAE is on the device only while it encodes, and the text encoders are loaded only if a text is
missing and freed before the U-Net loads, so that the memory of a run is that of its steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from torch import Tensor

from eri.data import (
    Encoded,
    Latents,
    Progress,
    Texts,
    TextStates,
    cache_latents,
    cache_texts,
    note,
)
from eri.models.text import TextEncoder
from eri.models.vae import VAE
from eri.run.base import BaseFacts
from eri.run.cache_space import latents_made_by, texts_made_by
from eri.run.conditions import Condition
from eri.run.dataset import told
from eri.run.image_set import ImageSet
from eri.run.memory_plan import MemoryPlan
from eri.run.samples import Samples, Text
from eri.train import say

__all__ = ["Encoder", "Reader", "tensor_cores"]


class Reader:
    """Prompts to text states, from the cache where they are there; free at the end of its block.

    Args:
        facts: of the base model whose encoders read.
        dtype: of the states.
        device: where they are worked out; they end on the CPU.
        progress: makes a bar for some work.
    """

    def __init__(
        self,
        facts: BaseFacts,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    ) -> None:
        self.facts = facts
        self.dtype = dtype
        self.device = device
        self.progress = progress
        self._encoder: TextEncoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def texts(self, prompts: Sequence[str], *, windows: int, weighted: bool) -> Texts:
        """The states of some prompts, each read in so many windows."""
        made_by = texts_made_by(
            self.facts, self.dtype, self.device, windows=windows, weighted=weighted
        )

        def encode(text: str) -> TextStates:
            if self._encoder is None:
                self._encoder = self.facts.load_text(self.device)
            context, pooled = self._encoder.encode([text], windows=windows, weighted=weighted)
            pooled = None if pooled is None else pooled[0].to("cpu", self.dtype)
            return TextStates(context[0].to("cpu", self.dtype), pooled)

        if self.progress is None:
            return cache_texts(prompts, encode, encoder=made_by)
        with self.progress("encoding captions") as progress:
            return cache_texts(prompts, encode, encoder=made_by, progress=progress)

    def guide(
        self, prompt: str, negative: str, *, weighted: bool = True
    ) -> tuple[Condition, Condition]:
        """The conditions of a prompt and of what it is guided away from, equally long.

        They hang on these two texts alone, so that a picture does not change with its neighbours.

        Args:
            prompt: what to draw.
            negative: what not to; in the syntax of the UIs.
            weighted: whether the prompt is in that syntax, too, or just text.
        """
        windows = self.facts.words.windows_needed([prompt, negative], weighted=[weighted, True])
        given = self.texts([prompt], windows=windows, weighted=weighted)[prompt]
        without = self.texts([negative], windows=windows, weighted=True)[negative]
        return Condition(given.context, given.pooled), Condition(without.context, without.pooled)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Lets convolutions in float32 run in TF32 on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Encoder:
    """Makes the samples of a run, and tells how far it is.

    Args:
        facts: of the base model whose encoders are used.
        dtype: of the text states.
        device: where is encoded.
        console: where people read.
        check_stop: called between two images or texts; raises to stop.
        memory: of the run; images that would not fit whole are encoded in tiles at once.
    """

    def __init__(
        self,
        facts: BaseFacts,
        *,
        dtype: torch.dtype,
        device: torch.device,
        console: Console,
        check_stop: Callable[[], None],
        memory: MemoryPlan | None = None,
    ) -> None:
        self.facts = facts
        self.dtype = dtype
        self.device = device
        self.console = console
        self.check_stop = check_stop
        self.memory = memory

    def reader(self) -> Reader:
        """A reader of prompts that shows its progress."""
        return Reader(self.facts, dtype=self.dtype, device=self.device, progress=self._progress)

    def latents(self, images: ImageSet, vae: VAE) -> Latents:
        """The latents of every version of every image; the VAE is on the device while it works.

        A GPU convolves in TF32, nearly three times as fast as in float32, for an error of about a
        thousandth of the latents' deviation (docs/benchmarks.md).
        """
        too_large = float("inf")  # pixels that were found not to fit whole

        def encode(pixels: Tensor) -> Encoded:
            nonlocal too_large
            area = pixels.shape[-2] * pixels.shape[-1]
            vae.to(self.device)
            if area >= too_large or not self._fits(vae, area):
                return *vae.encode(pixels, tiled=True), True
            mean, std, tiled = vae.encode_within_memory(pixels)
            too_large = area if tiled else too_large
            return mean, std, tiled

        made_by = latents_made_by(self.facts, self.device)
        with self._progress("encoding images") as progress, tensor_cores():
            latents = cache_latents(images.cuts, encode, encoder=made_by, progress=progress)
        vae.to("cpu")
        outside: dict[bool, dict[Path, None]] = {False: {}, True: {}}
        for item in (images.cuts[index].item for index in latents.masked_out()):
            weight = images.sources[item.source].unmasked_weight
            outside[weight > 0][item.path] = None
        for teaches, paths in outside.items():
            what = "teach what the mask leaves out" if teaches else "teach nothing"
            for line in note("images of which a cut keeps nothing of their mask", list(paths)):
                say(self.console, f"note: {line}; these samples {what}")
        return latents

    def _fits(self, vae: VAE, pixels: int) -> bool:
        return self.memory is None or self.memory.encodes_whole(
            pixels, sum(p.nbytes for p in vae.model.parameters())
        )

    def samples(
        self,
        images: ImageSet,
        latents: Latents,
        reader: Reader,
        wanted: Iterable[Text],
        *,
        least_windows: int = 1,
        seed: int = 0,
    ) -> Samples:
        """Images with their captions.

        Args:
            images: checked ones.
            latents: theirs.
            reader: of the captions.
            wanted: every text that is read with the images.
            least_windows: of the text encoder, in which captions are read; more if they need more.
            seed: of the run.
        """
        prompts: dict[bool, list[str]] = {False: [], True: []}
        for text, weighted in dict.fromkeys(wanted):
            prompts[weighted].append(text)
        windows = max(least_windows, images.windows)
        texts = {
            weighted: reader.texts(texts, windows=windows, weighted=weighted)
            for weighted, texts in prompts.items()
        }
        return Samples(images, latents, texts, windows=windows, seed=seed)

    def _progress(self, what: str) -> AbstractContextManager[Progress]:
        return told(self.console, what, self.check_stop)
