"""The diffusion section: the training objective and what can sample it."""

import math
from typing import Literal

from pydantic import Field

from promoe_ds.config.section import Section, require

#: With so many timesteps the linear schedule's last beta is 1 (0.02 * 1000 / 20).
_MIN_DDPM_TIMESTEPS = 20

#: Esser et al. (2024), Sec. 3.1: from there on the mode distribution has no density.
_MAX_MODE_SCALE = 2 / (math.pi - 2)

#: What samples which objective; `auto` is the first.
SOLVERS = {"rectified_flow": ("euler", "heun", "unipc", "dpmpp"), "ddpm": ("ddpm", "ddim")}


class DiffusionConfig(Section):
    """Rectified flow (Esser et al., 2024), or DDPM as trained by DiT."""

    objective: Literal["rectified_flow", "ddpm"] = Field(
        "rectified_flow", description="predicts velocity | noise and variance"
    )
    noise_levels: Literal["logit_normal", "mode", "uniform"] = Field(
        "logit_normal", description="distribution of training's sigma; rectified flow only"
    )
    sigma_mean: float = Field(
        0.0, description="of the normal under the logistic function; logit_normal only"
    )
    sigma_std: float = Field(
        1.0,
        gt=0,
        description="of that normal; others multiply both by a sigmoid_scale; logit_normal only",
    )
    mode_scale: float = Field(
        1.29, ge=-1, le=_MAX_MODE_SCALE, description="more favours the middle; mode only"
    )
    train_shift: float = Field(
        1.0, gt=0, description="of training's sigmas: more favours noise; rectified flow only"
    )
    num_train_timesteps: int = Field(
        1000, gt=0, description="timestep = sigma * num_train_timesteps; length of DDPM's chain"
    )
    shift: float = Field(
        1.0, gt=0, description="of the sampler's sigmas, applied once; rectified flow only"
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="probability of the null label in training"
    )

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        if self.objective == "ddpm":
            flow = "noise_levels", "sigma_mean", "sigma_std", "mode_scale", "train_shift", "shift"
            self.refuse_set(*flow, use="objective=ddpm")
            require(
                self.num_train_timesteps > _MIN_DDPM_TIMESTEPS,
                f"num_train_timesteps={self.num_train_timesteps}: the linear schedule of"
                f" objective=ddpm needs more than {_MIN_DDPM_TIMESTEPS}, or its last step would"
                " keep nothing of the image",
            )

        if self.noise_levels != "logit_normal":
            use = f"noise_levels={self.noise_levels}"
            self.refuse_set("sigma_mean", "sigma_std", use=use)
        if self.noise_levels != "mode":
            self.refuse_set("mode_scale", use=f"noise_levels={self.noise_levels}")

    @property
    def solvers(self) -> tuple[str, ...]:
        """The samplers that fit the objective, its default first."""
        return SOLVERS[self.objective]

    @property
    def trains_null_label(self) -> bool:
        """Whether training sees images with their condition and without; guidance needs both."""
        return 0 < self.label_dropout < 1

    def sampling_problem(self, *, solver: str | None = None, steps: int | None = None) -> str:
        """Return why a model of this objective cannot be sampled so, or nothing.

        The text starts with the field's bare name, for the caller to say whether a recipe or a
        command line set it.
        """
        if solver not in (None, "auto", *self.solvers):
            return (
                f"solver={solver} cannot sample diffusion.objective={self.objective}: set it to"
                f" {', '.join(self.solvers)} or auto"
            )
        if (
            self.objective == "ddpm"
            and steps is not None
            and not 2 <= steps <= self.num_train_timesteps
        ):
            return (
                f"steps={steps}: diffusion.objective=ddpm is sampled in 2 ..."
                f" diffusion.num_train_timesteps={self.num_train_timesteps} steps"
            )
        return ""
