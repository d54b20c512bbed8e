"""The evaluation section: samples judged while training."""

from __future__ import annotations

from pydantic import Field, model_validator

from promoe_ds.config.section import Section


class EvaluationConfig(Section):
    """The Fréchet distance of samples of the averaged weights to reference images, every so many
    steps.
    """

    every: int = Field(0, ge=0, description="steps; a multiple of train.log_every; 0: never")
    reference: str | None = Field(
        None, description="npz with mu and sigma (or arr_0), or folder of images"
    )
    extractor: str = Field(
        "inception", description="inception, pixels, or the path of a network: see docs/imagenet.md"
    )
    samples: int = Field(
        5000, gt=0, description="drawn each time, always the same noise and labels"
    )
    batch_size: int = Field(64, gt=0, description="images a rank draws at once")
    steps: int | None = Field(None, gt=0, description="of the solver; sampling.steps if left out")
    cfg_scale: float = Field(1.0, ge=0, description="of classifier-free guidance; 1 is none")
    seed: int = Field(0, ge=0, lt=2**63, description="of noise and labels")

    @model_validator(mode="after")
    def _fields_fit(self) -> EvaluationConfig:
        if self.every and self.reference is None:
            raise ValueError(
                f"every={self.every} needs a reference: the path of an npz or of a folder of images"
            )
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: a covariance needs at least 2")
        return self
