"""The data section: where samples come from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from promoe_ds.config.section import NameIn, Section, Switch, require


@dataclass(frozen=True, kw_only=True)
class DatasetTraits:
    """What the rest of a run must know of a data set before it is opened.

    folder: what `data.path` holds, "" if it is not read.
    conditions: what its samples may be conditioned on.
    size: pixels a side and channels of pictures that come as they are; None: the recipe's.
    classes: that it has labels of, 0 if the recipe says so.
    holds_latents: whether its samples are an autoencoder's, whatever their channels.
    """

    folder: str = ""
    conditions: tuple[str, ...] = ("class", "text")
    size: tuple[int, int] | None = None
    classes: int = 0
    holds_latents: bool = False


#: Every data set; what opens it is the entry of promoe_ds.data.build.DATASETS. A file that --import
# names adds its own (examples/custom_dataset.py).
DATASETS: dict[str, DatasetTraits] = {
    "digits": DatasetTraits(size=(8, 1), conditions=("class",), classes=10),
    "emoji": DatasetTraits(size=(32, 3), conditions=("text",)),
    "latents": DatasetTraits(folder="the folder of *.safetensors shards", holds_latents=True),
    "images": DatasetTraits(
        folder="a tree of images, one folder a class", conditions=("class",), holds_latents=True
    ),
    "synthetic": DatasetTraits(),
}


class DataConfig(Section):
    """Where samples come from."""

    dataset: Annotated[str, NameIn(DATASETS)] = Field(
        "digits",
        description=(
            "scikit-learn's digits; OpenMoji's pictures with captions; encoded latents; images, "
            "encoded on the fly; or noise, to time"
        ),
    )
    path: str | None = Field(None, description="folder of `latents`, or of a tree of `images`")
    latent_scale: float = Field(1.0, gt=0, description="latents are multiplied by it")
    vae: str | None = Field(
        None,
        description=(
            "AutoencoderKL: folder, hub id or fingerprint; what latents must come from, and what "
            "encodes images and decodes samples"
        ),
    )
    vae_dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="of the autoencoder that encodes images on the fly"
    )
    flip: Switch = Field(
        "auto",
        description="mirror half of the samples; auto: images, and latents with a mirrored twin",
    )
    workers: int = Field(
        8, gt=0, description="threads a rank that read images or single latent files"
    )
    max_corrupt: int = Field(
        0,
        ge=0,
        description=(
            "unreadable images a rank replaces by the next one before it stops; counted anew "
            "by each rank and after each start"
        ),
    )
    text_encoder: str | None = Field(
        None,
        description=(
            "transformers text encoder: folder, hub id or fingerprint; what texts must be encoded"
            " by, and what encodes prompts when sampling"
        ),
    )
    text_fingerprint: str | None = Field(
        None,
        description=(
            "checksum of the text encoder's weights; training writes it into the run's config, and "
            "no other encoder is taken afterwards"
        ),
    )
    caption_groups: int = Field(
        0, ge=0, description="groups of captions that statistics count; 0: none are known"
    )
    heldout_fraction: float = Field(0.2, gt=0, lt=1, description="of digits, never trained on")
    synthetic_samples: int = Field(4096, gt=0, description="length of the data set `synthetic`")

    @property
    def traits(self) -> DatasetTraits:
        """What DATASETS says of this data set."""
        return DATASETS[self.dataset]

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        if not self.traits.folder:
            self.refuse_set("path", use=f"dataset={self.dataset}")
            require(
                self.flip is not True,
                f"flip=true has no use for dataset={self.dataset}: leave it out",
            )
        require(
            self.dataset != "images" or self.vae is not None,
            "dataset=images encodes on the fly: set vae to the folder or hub id of an"
            " AutoencoderKL",
        )
        require(
            self.dataset != "emoji" or self.text_encoder is not None,
            "dataset=emoji encodes its captions: set text_encoder, e.g. to all-minilm-l6-v2",
        )
