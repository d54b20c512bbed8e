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
    several_sizes: whether its samples may be of the sizes of `model.buckets`.
    """

    folder: str = ""
    conditions: tuple[str, ...] = ("class", "text")
    size: tuple[int, int] | None = None
    classes: int = 0
    holds_latents: bool = False
    several_sizes: bool = False


#: Every data set; what opens it is the entry of promoe_ds.data.build.DATASETS. A file that --import
# names adds its own (examples/custom_dataset.py).
DATASETS: dict[str, DatasetTraits] = {
    "digits": DatasetTraits(size=(8, 1), conditions=("class",), classes=10),
    "emoji": DatasetTraits(size=(32, 3), conditions=("text",)),
    "latents": DatasetTraits(
        folder="the folder of *.safetensors shards", holds_latents=True, several_sizes=True
    ),
    "images": DatasetTraits(
        folder="a tree of images, one folder a class", conditions=("class",), holds_latents=True
    ),
    "synthetic": DatasetTraits(several_sizes=True),
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
    latent_normalization: Literal["auto", "scale", "channel", "none"] = Field(
        "auto",
        description=(
            "auto: what the autoencoder's config states, mean and deviation by channel, else scale"
            " and shift; scale: scale and shift alone; channel: what was measured of the latents;"
            " none. Values set below win, and training writes those that it takes into checkpoints"
        ),
    )
    latent_scale: float = Field(
        1.0, gt=0, description="latents are multiplied by it; 1 is what latent_normalization says"
    )
    latents_mean: tuple[float, ...] = Field(
        (), description="before that subtracted from latents: one value (a shift) or one a channel"
    )
    latents_std: tuple[float, ...] = Field(
        (), description="before that latents are divided by it: one value or one a channel"
    )
    latents_normalized: bool = Field(
        False,
        description=(
            "`latents` are stored normalised: training takes them as they are, samples are"
            " denormalised all the same"
        ),
    )
    check_latents: bool = Field(
        True,
        description=(
            "refuse `latents` and `images` whose first samples, normalised, are far from mean 0 and"
            " deviation 1"
        ),
    )
    vae: str | None = Field(
        None,
        description=(
            "diffusers autoencoder: folder, hub id (owner/name or owner/name/subfolder) or"
            " fingerprint; what latents must come from, and what encodes images and decodes samples"
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
            "dataset=images encodes on the fly: set vae to the folder or hub id of an autoencoder",
        )
        require(
            all(each > 0 for each in self.latents_std),
            f"latents_std={self.latents_std} divides latents: all values must be above 0",
        )
        self._check_normalization()
        require(
            self.dataset != "emoji" or self.text_encoder is not None,
            "dataset=emoji encodes its captions: set text_encoder, e.g. to all-minilm-l6-v2",
        )

    def _check_normalization(self) -> None:
        """Refuse values that contradict the kind of normalisation."""
        kind = self.latent_normalization
        unused = {
            "none": ("latent_scale", "latents_mean", "latents_std"),
            "scale": ("latents_std",),
            "channel": ("latent_scale",),
        }
        self.refuse_set(*unused.get(kind, ()), use=f"latent_normalization={kind}")
        if not self.latents_normalized:
            return
        require(
            self.dataset == "latents",
            f"latents_normalized=true has no use for dataset={self.dataset}: leave it out",
        )
        require(
            kind == "auto" or kind == "scale" or bool(self.latents_std),
            f"latents_normalized=true, but latent_normalization={kind} does not say by what: set"
            " latent_scale, or latents_mean and latents_std",
        )
