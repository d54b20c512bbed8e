"""The precision section: in which numbers a run computes, and with whose kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from promoe_ds.config.section import Section

Fp8Recipe = Literal["delayed", "current", "block", "mxfp8"]


def fp8_multiple(recipe: str) -> int:
    """Return what rows and widths of a recipe's matrix products must be multiples of: MXFP8 scales
    blocks of 32 numbers.
    """
    return 32 if recipe == "mxfp8" else 16


class PrecisionConfig(Section):
    """fp32, bf16, fp32 weights with bf16 products, or bf16 weights with FP8 products; and whose
    kernels.
    """

    compute: Literal["auto", "fp32", "bf16", "bf16_autocast", "fp8"] = Field(
        "auto",
        description="auto: as bf16.enabled of the DeepSpeed JSON says; bf16_autocast: fp32 weights"
        " and residual stream, bf16 products, as published",
    )
    fp8_recipe: Literal["auto", Fp8Recipe] = Field(
        "auto",
        description="how FP8 numbers are scaled; auto: mxfp8 where the device has it, else current",
    )
    kernels: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: transformer_engine for fp8"
    )

    @model_validator(mode="after")
    def _choices_fit(self) -> PrecisionConfig:
        if self.fp8_recipe != "auto" and self.compute != "fp8":
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} has no use for compute={self.compute}: set"
                " compute=fp8, or leave it out"
            )
        if self.compute == "fp8" and self.kernels == "torch":
            raise ValueError(
                "kernels=torch has no FP8 path (compute=fp8): use kernels=transformer_engine, or"
                " compute=bf16"
            )
        if self.compute == "bf16_autocast" and self.kernels == "transformer_engine":
            raise ValueError(
                "compute=bf16_autocast casts for torch's products: leave kernels out, or use"
                " compute=bf16"
            )
        return self

    @property
    def has_bf16_weights(self) -> bool:
        """Whether `compute` asks for them; False for auto, where the DeepSpeed JSON says it."""
        return self.compute in ("bf16", "fp8")

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether attention, feed-forwards and experts run on Transformer Engine."""
        return self.kernels == "transformer_engine" or (
            self.kernels == "auto" and self.compute == "fp8"
        )
