"""The optimizer section: AdamW, its schedule, clipping, and the moving averages of the weights."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from promoe_ds.config.section import Section, require

#: Every average's name begins so; the first one has no more to its name.
EMA = "ema"
#: Relative length of the flattest power function (gamma = 0): the plain mean of all weights.
LONGEST_POWER_LENGTH = 12**-0.5

#: From here on the initial weights' part of an average is reported.
NOTED_SHARE = 0.1

_Fraction = Annotated[float, Field(ge=0, lt=1)]
_PowerLength = Annotated[float, Field(gt=0, lt=LONGEST_POWER_LENGTH)]


@dataclass(frozen=True, kw_only=True)
class Average:
    """How a moving average forgets: by a constant decay, or as a power function tau^exponent of the
    training so far.

    warmup: whether the decay grows to its value; an average is the same one with it and without.
    """

    decay: float = 0.0
    exponent: float | None = None
    warmup: bool = field(default=False, compare=False)

    def decay_at(self, update: int) -> float:
        """Return what is kept of the average at an update, counted from 1.

        Source: for power functions EDM2 (Karras et al., 2024), Sec. 3.1: (1 - 1/t)^(gamma + 1); the
        warm-up is TensorFlow's, min(decay, (1 + t) / (10 + t)).
        """
        if self.exponent is not None:
            return (1 - 1 / update) ** (self.exponent + 1)
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    def initial_share(self, updates: int) -> float:
        """Return how much of the average is still the weights that it started from, after some
        updates.
        """
        if self.exponent is not None:
            return 0.0
        # updates in which the decay still grew; their product is 10! / ((t + 2) ... (t + 10))
        grown = 0
        if self.warmup:
            grown = min(updates, max(0, math.ceil((10 * self.decay - 1) / (1 - self.decay)) - 1))
        growing = math.factorial(10) / math.prod(grown + k for k in range(2, 11)) if grown else 1.0
        return growing * self.decay ** (updates - grown)

    def __str__(self) -> str:
        return f"decay {self.decay}" if self.exponent is None else f"gamma {self.exponent:.4g}"

    def warning(self, name: str, updates: int) -> str:
        """Return a line that says so, if much of the average `name` is what it started from after
        some updates.
        """
        share = self.initial_share(updates)
        if share < NOTED_SHARE:
            return ""
        return (
            f"after {updates} updates {share:.0%} of the average {name} ({self}) is the weights"
            " that it started from: take the raw weights, or train with optimizer.ema_warmup=true"
            " or a lower decay in optimizer.ema_decays"
        )


class OptimizerConfig(Section):
    """AdamW, its schedule, clipping and the moving averages of the weights."""

    implementation: Literal["auto", "torch", "apex"] = Field(
        "auto",
        description="of AdamW: torch's fused one (auto, too), or FusedAdam of NVIDIA apex, on GPUs",
    )
    lr: float = Field(1e-4, gt=0, description="learning rate after the warm-up")
    betas: tuple[_Fraction, _Fraction] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(
        0.0, ge=0, description="on matrices only, never on biases or prototypes"
    )
    max_grad_norm: float = Field(
        0.5, ge=0, description="of the global gradient norm; 0 switches clipping off"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps in which the learning rate grows to lr, linearly"
    )
    min_lr: float = Field(0.0, ge=0, description="where linear and cosine end")
    schedule_steps: int | None = Field(
        None,
        gt=0,
        description="where linear and cosine end, as a step; train.max_steps if left out",
    )
    ema_decays: tuple[_Fraction, ...] = Field(
        (0.9999,),
        min_length=1,
        description=(
            "of the moving averages of the weights, kept "
            "side by side; the first is the one that samples are drawn from"
        ),
    )
    ema_warmup: bool = Field(
        False,
        description=(
            "let these decays grow from 0.18, min(decay, (1 + t) / (10 + t)) at update t: "
            "for short runs, of whose average the initial weights are a large part"
        ),
    )
    ema_sigma_rels: tuple[_PowerLength, ...] = Field(
        (),
        description=(
            "relative lengths of power-function averages, from which "
            "another length can be had after training; EDM2 keeps 0.05 and 0.1"
        ),
    )

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        require(self.min_lr <= self.lr, f"min_lr={self.min_lr} exceeds lr={self.lr}: lower it")
        require(
            len(set(self.averages.values())) == len(self.ema_decays) + len(self.ema_sigma_rels),
            f"ema_decays={list(self.ema_decays)}, ema_sigma_rels={list(self.ema_sigma_rels)}: two"
            f" averages are the same in the six digits of their names ({', '.join(self.averages)}):"
            " leave one out",
        )

    @property
    def averages(self) -> dict[str, Average]:
        """The moving averages by name: `ema` for the first decay, `ema_<decay>` for the others,
        `ema_power_<length>`.
        """
        names = (EMA, *(f"{EMA}_{decay:g}" for decay in self.ema_decays[1:]))
        return {
            **{
                name: Average(decay=decay, warmup=self.ema_warmup)
                for name, decay in zip(names, self.ema_decays, strict=True)
            },
            **{
                power_average(length): Average(exponent=power_exponent(length))
                for length in self.ema_sigma_rels
            },
        }


def power_average(length: float) -> str:
    """Return the name of the power-function average of a relative length."""
    return f"{EMA}_power_{length:g}"


def power_exponent(length: float) -> float:
    """Return gamma of the power function tau^gamma whose standard deviation is `length` times the
    training so far.

    Source: EDM2 (Karras et al., 2024), Sec. 3.1: length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma +
    3)).
    Raises: ValueError unless 0 < length < 12^-0.5.
    """
    if not 0 < length < LONGEST_POWER_LENGTH:
        raise ValueError(f"length={length} must be between 0 and {LONGEST_POWER_LENGTH:.4f}")
    low, high = 0.0, 1 / length  # at 1 / length, the square is below length^2
    while (middle := (low + high) / 2) not in (low, high):
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2:
            low = middle
        else:
            high = middle
    return middle


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then the schedule, by step
    alone.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last = config.schedule_steps or max_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, last - config.warmup_steps))
    remaining = (
        1.0 - progress
        if config.schedule == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return config.min_lr + (config.lr - config.min_lr) * remaining
