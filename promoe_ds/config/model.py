"""The model section: the sizes of the network."""

from typing import Any, Literal

from pydantic import Field, model_validator

from promoe_ds.config.section import Section, require

#: The sizes of ProMoE's Table 2, which are DiT's, and one between B and L.
PRESETS: dict[str, dict[str, int]] = {
    "s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "m": {"hidden_size": 960, "depth": 16, "num_heads": 15},
    "l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


class ModelConfig(Section):
    """The diffusion transformer's sizes (Peebles & Xie, 2023; ProMoE Table 2)."""

    preset: Literal["s", "b", "m", "l", "xl"] | None = Field(
        None, description="fills the sizes left out"
    )
    input_size: int = Field(32, gt=0, description="height and width of a latent, in latent pixels")
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
    mlp_ratio: float = Field(4.0, gt=0, description="width of a dense feed-forward over D")
    mlp_type: Literal["gelu", "swiglu"] = Field(
        "gelu", description="of dense feed-forwards, as routing.expert_type"
    )
    qk_norm: bool = Field(False, description="normalise queries and keys of every head")
    learn_sigma: bool = Field(
        True, description="twice the channels out; the first half is the prediction"
    )
    condition: Literal["class", "text"] = Field(
        "class", description="what images are conditioned on: a label | an encoded text"
    )
    num_classes: int = Field(
        1000, gt=0, description="the null label is num_classes; condition=class only"
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
        return {**PRESETS.get(str(values.get("preset")), {}), **values}

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        if self.condition == "text":
            self.refuse_set("num_classes", use="condition=text")
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
            self.input_size % self.patch_size == 0,
            f"patch_size={self.patch_size} does not divide input_size={self.input_size}: change one"
            " of them",
        )

    @property
    def null_label(self) -> int:
        """The label that means «no condition»."""
        return self.num_classes

    @property
    def head_width(self) -> int:
        """Width of one head of attention."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def pooled_width(self) -> int:
        """Width of the vector of a whole text."""
        return self.text_pooled_width or self.text_width

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text; 0 where there are none."""
        return self.text_length if self.condition == "text" else 0

    @property
    def tokens_per_image(self) -> int:
        """S: patches of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return self.in_channels * (2 if self.learn_sigma else 1)
