"""The settings of a folder of images: what is in it, how often it is seen, and how it is varied."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from eri.config.section import FolderPath, Section

__all__ = ["CaptionRules", "DataSource"]


def _color(value: str) -> str:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        raise ValueError("a color as '#rrggbb', in quotes")
    return value.lower()


class CaptionRules(Section):
    """How the caption of a sample is made from what is written beside its image."""

    prefix: str = Field(default="", description="text put before every caption")
    suffix: str = Field(default="", description="text put behind every caption")
    trigger: str | None = Field(
        default=None,
        description="word that stands for what is learned: replaces [trigger] in captions, and "
        "begins those that have neither",
    )
    lines: bool = Field(
        default=False,
        description="whether every line of a caption file is a caption of its own, one of which is "
        "drawn for a sample",
    )
    wildcards: bool = Field(
        default=False, description="whether {red|blue} in a caption stands for one of the two"
    )
    shuffle_tags: bool = Field(
        default=False, description="whether the parts between commas come in a random order"
    )
    keep_tags: int = Field(
        default=0, ge=0, le=1000, description="first parts that stay where and what they are"
    )
    drop_tags: float = Field(
        default=0.0, ge=0, lt=1, description="share of the parts between commas left out at random"
    )
    drop: float = Field(
        default=0.0, ge=0, le=1, description="share of the samples that have an empty caption"
    )
    variants: int = Field(
        default=16,
        ge=1,
        le=1000,
        description="most texts that chance makes of one caption; each is encoded and kept once",
    )
    weights: bool = Field(
        default=False,
        description="whether (a cat:1.2) in a caption is a weight, as in the UIs, or just text",
    )

    @property
    def varies(self) -> bool:
        """Whether chance makes several texts of one caption."""
        return self.wildcards or self.shuffle_tags or self.drop_tags > 0


class DataSource(Section):
    """A folder of images with their captions."""

    path: FolderPath = Field(
        description="folder of images, searched with its subfolders; captions are found beside "
        "them: .txt, .caption, .json, metadata.jsonl, metadata.csv"
    )
    repeats: int = Field(
        default=1, ge=1, le=10_000, description="times that an epoch shows each of the images"
    )
    weight: float = Field(
        default=1.0, gt=0, le=100, description="factor of the loss of these images"
    )
    regularization: bool = Field(
        default=False,
        description="whether these images only keep what the model can do already: they get no "
        "trigger word, are not previewed, and their views do not count in steps: auto",
    )
    resolution: Literal["auto"] | Annotated[int, Field(ge=64, le=4096)] = Field(
        default="auto",
        description="side in pixels of the square whose area the images are scaled to; auto is "
        "the model's own",
    )
    upscale: bool = Field(
        default=False, description="whether smaller images are enlarged to the resolution"
    )
    missing_caption: Literal["stop", "empty", "filename"] = Field(
        default="stop",
        description="for an image without caption: stop, use an empty one, or use its file name",
    )
    on_bad: Literal["stop", "skip"] = Field(
        default="stop",
        description="for a file that cannot be read: stop, or go on without it and say so",
    )
    max_megapixels: int = Field(
        default=100,
        ge=1,
        le=2000,
        description="size in millions of pixels above which an image is refused",
    )
    background: Annotated[str, AfterValidator(_color)] = Field(
        default="#ffffff",
        description="color that transparent images are laid on, as #rrggbb",
    )
    validation: FolderPath | None = Field(
        default=None,
        description="folder of captioned images that are not trained on; their loss is measured "
        "at the start and the end",
    )
    mask: Literal["none", "file", "alpha"] = Field(
        default="none",
        description="what says which parts are learned: none, a file <name>-masklabel.png or "
        "<name>.mask.png beside the image (white is learned), or the image's own transparency",
    )
    unmasked_weight: float = Field(
        default=0.0, ge=0, le=1, description="weight of what the mask leaves out"
    )
    flip: bool = Field(
        default=False, description="whether half of the samples are mirrored, left and right"
    )
    crop_jitter: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="most that the cut out of an image is narrowed, as a share, at a random place",
    )
    color: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="most that brightness, contrast and saturation are changed, as a share",
    )
    variants: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="versions that crop_jitter and color make of an image; each is encoded and "
        "kept once",
    )
    caption: CaptionRules = Field(default=CaptionRules(), description="how captions are used")

    @property
    def varies(self) -> bool:
        """Whether chance makes several versions of one image, which may be mirrored besides."""
        return self.crop_jitter > 0 or self.color > 0
