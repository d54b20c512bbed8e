"""The model section: the sizes of the network."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, model_validator

from promoe_ds.config.section import Section, require

#: The sizes of ProMoE's Table 2, which are DiT's, and its code's M, between B and L.
PRESETS: dict[str, dict[str, int]] = {
    "s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "m": {"hidden_size": 960, "depth": 16, "num_heads": 16},
    "l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

#: What block=modern fills in where it is left out; a multiple of its widths, for MXFP8's products.
_MODERN = {"mlp_type": "swiglu", "qk_norm": True}
_WIDTH_MULTIPLE = 32

_SIDE = TypeAdapter(PositiveInt)


def read_size(value: Any) -> int | tuple[int, int]:
    """Return a size as it is kept: one number of a square, else (height, width).

    Raises: ValueError unless it is one or two whole numbers above 0.
    """
    given = value if isinstance(value, list | tuple) else [value, value]
    try:
        height, width = map(_SIDE.validate_python, given)
    except ValueError:
        raise ValueError("expected a whole number above 0, or two: [height, width]") from None
    return height if height == width else (height, width)


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and the width of a size."""
    return (size, size) if isinstance(size, int) else size


def size_name(size: int | tuple[int, int]) -> str:
    """Return a size as commands and folders name it, e.g. 28x36."""
    return "x".join(map(str, sides(size)))


#: Of latents or images.
Size = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(read_size)]


class ModelConfig(Section):
    """The diffusion transformer's sizes (Peebles & Xie, 2023; ProMoE Table 2)."""

    preset: Literal["s", "b", "m", "l", "xl"] | None = Field(
        None, description="fills the sizes left out"
    )
    input_size: Size = Field(
        32, description="side of a latent in latent pixels, or its [height, width]"
    )
    buckets: tuple[Size, ...] = Field(
        (),
        description=(
            "sizes of latents where there are several, one a batch; input_size is the largest of"
            " them, by which costs are counted"
        ),
    )
    position_scale: float = Field(
        1.0,
        gt=0,
        description=(
            "patch coordinates are multiplied by it: 0.5 keeps the positions of a model of half the"
            " input_size"
        ),
    )
    patch_size: int = Field(2, gt=0, description="side of a patch, which is one token")
    in_channels: int = Field(4, gt=0, description="of a latent")
    hidden_size: int = Field(gt=0, description="width D")
    depth: int = Field(gt=0, description="blocks")
    num_heads: int = Field(gt=0, description="of attention; divides D unless head_dim is given")
    head_dim: int | None = Field(
        None, gt=0, description="width of a head; hidden_size / num_heads if left out"
    )
    block: Literal["dit", "modern"] = Field(
        "dit",
        description=(
            "dit: layer norm; modern: RMSNorm, rotary positions by row and column beside the added"
            " ones and, where left out, qk_norm=true, mlp_type=swiglu, routing.expert_type=swiglu"
        ),
    )
    mlp_ratio: float = Field(
        4.0,
        gt=0,
        description=(
            "width of a dense feed-forward over D; under block=modern of one with GELU: SwiGLU's is"
            " 2/3 of it, to the nearest multiple of 32, which costs the same"
        ),
    )
    mlp_type: Literal["gelu", "swiglu"] = Field(
        "gelu", description="of dense feed-forwards, as routing.expert_type"
    )
    qk_norm: bool = Field(False, description="normalise queries and keys of every head")
    learn_sigma: bool = Field(
        True, description="twice the channels out; the first half is the prediction"
    )
    time: Literal["noise", "data"] = Field(
        "noise",
        description=(
            "what the network sees and predicts: noise at num_train_timesteps and noise - clean |"
            " data at 1 and clean - noise, as SiT's and DiffMoE's flows; rectified flow only"
        ),
    )
    condition: Literal["class", "text"] = Field(
        "class", description="what images are conditioned on: a label | an encoded text"
    )
    num_classes: int = Field(
        1000, gt=0, description="the null label is num_classes; condition=class only"
    )
    null_row: bool = Field(
        True,
        description=(
            "whether the label table has a row for the null label, its last; without it"
            " label_dropout is 0; condition=class only"
        ),
    )
    text_width: int = Field(
        384, gt=0, description="of the text encoder's states; condition=text only"
    )
    text_pooled_width: int | None = Field(
        None, gt=0, description="of the encoder's vector of a whole text; text_width if left out"
    )
    text_length: int = Field(
        64, gt=1, description="longest text in tokens, cut behind it; condition=text only"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        block = _MODERN if values.get("block") == "modern" else {}
        return {**PRESETS.get(str(values.get("preset")), {}), **block, **values}

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        if self.condition == "text":
            self.refuse_set("num_classes", "null_row", use="condition=text")
        else:
            texts = "text_width", "text_pooled_width", "text_length"
            self.refuse_set(*texts, use="condition=class")
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}: give"
            " head_dim, or another number",
        )
        require(
            self.hidden_size % 4 == 0,
            f"hidden_size={self.hidden_size} must be a multiple of 4 (sin-cos positions)",
        )
        require(
            self.block == "dit" or self.head_width % 4 == 0,
            f"block=modern turns pairs of a head by row and column: a head's width"
            f" {self.head_width} must be a multiple of 4: give head_dim, or another num_heads",
        )
        self._check_sizes()

    def _check_sizes(self) -> None:
        for name, size in (
            ("input_size", self.input_size),
            *(("buckets", size) for size in self.buckets),
        ):
            require(
                not any(side % self.patch_size for side in sides(size)),
                f"patch_size={self.patch_size} does not divide {name}={size_name(size)}: change"
                " one of them",
            )
        if not self.buckets:
            return
        names = ", ".join(map(size_name, self.buckets))
        require(
            len(set(self.buckets)) == len(self.buckets),
            f"buckets={names} names a size twice",
        )
        require(
            self.input_size in self.buckets
            and all(self.tokens_of(size) <= self.tokens_per_image for size in self.buckets),
            f"input_size={size_name(self.input_size)} must be the largest of buckets={names}",
        )

    @property
    def null_label(self) -> int:
        """The label that means «no condition»."""
        return self.num_classes

    @property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.null_row

    @property
    def head_width(self) -> int:
        """Width of one head of attention."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attention_width(self) -> int:
        """Width of all heads of attention together."""
        return self.num_heads * self.head_width

    def hidden_width(self, feed_forward: str, parts: int = 1) -> int:
        """Return the hidden width of one of `parts` that together are a dense feed-forward, of type
        gelu or swiglu: in a DiT block, as published, the same, in a modern one as costly.
        """
        width = max(1, int(self.mlp_ratio * self.hidden_size) // parts)
        if self.block == "dit" or feed_forward == "gelu":
            return width
        return max(1, round(width * 2 / 3 / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE

    @property
    def pooled_width(self) -> int:
        """Width of the vector of a whole text."""
        return self.text_pooled_width or self.text_width

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text; 0 where there are none."""
        return self.text_length if self.condition == "text" else 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent; of the largest bucket, where there are several."""
        return sides(self.input_size)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every size that the model is trained at."""
        return tuple(map(sides, self.buckets)) or (self.latent_size,)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a latent of `latent_size`."""
        return self.grid_of(self.latent_size)

    def grid_of(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a latent of some size."""
        height, width = latent_size
        return height // self.patch_size, width // self.patch_size

    def tokens_of(self, size: int | tuple[int, int]) -> int:
        """Return the patches of a latent of some size."""
        rows, columns = self.grid_of(sides(size))
        return rows * columns

    @property
    def tokens_per_image(self) -> int:
        """S: patches of one image; of the largest, where there are several sizes."""
        return self.tokens_of(self.input_size)

    @property
    def fewest_tokens(self) -> int:
        """Patches of the smallest image."""
        return min(map(self.tokens_of, self.sizes))

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return self.in_channels * (2 if self.learn_sigma else 1)
