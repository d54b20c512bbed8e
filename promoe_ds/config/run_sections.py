"""The sections about the course of a run: how long it trains and under which time-outs, what it
records, evaluates and samples.
"""

from typing import Literal

from pydantic import Field

from promoe_ds.config.section import Section, Switch, require


class TrainConfig(Section):
    """How long, how much at a time, what is written when."""

    global_batch_size: int = Field(
        256, gt=0, description="samples per optimizer step, over all ranks"
    )
    micro_batch_size: int | None = Field(
        None, gt=0, description="per rank and pass; global / ranks if left out"
    )
    max_steps: int = Field(
        gt=0,
        description=(
            "optimizer steps; the schedule ends there, unless optimizer.schedule_steps says where"
        ),
    )
    stop_after_steps: int | None = Field(
        None,
        gt=0,
        description=(
            "end this process after so many steps, as an "
            "interruption would; the schedule is unchanged"
        ),
    )
    log_every: int = Field(
        50, gt=0, description="steps between lines of metrics.jsonl and routing.jsonl"
    )
    checkpoint_every: int = Field(1000, gt=0, description="steps; the last one is saved as well")
    keep_last: int = Field(3, gt=0, description="complete checkpoints kept")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints of multiples of this step are kept for good"
    )
    async_checkpoint: bool = Field(
        False, description="write checkpoints while training continues, from a copy in host memory"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of weights, order of the data, noise and label dropout"
    )
    max_nonfinite_steps: int = Field(3, gt=0, description="skipped in a row before the run stops")
    freeze: tuple[str, ...] = Field(
        (),
        description=(
            "names of parameters that are not trained, with * and ?: patch_embedding.*,"
            " blocks.*.moe.routed.*"
        ),
    )


class SupervisionConfig(Section):
    """Time-outs of one rank's watchdog; those of single collectives are
    `parallel.timeout_seconds`.
    """

    setup_timeout_seconds: float = Field(
        1800.0, gt=0, description="from the start of a process to the end of its first step"
    )
    step_timeout_seconds: float = Field(
        900.0, gt=0, description="one optimizer step, with what is logged after it"
    )
    checkpoint_timeout_seconds: float = Field(1800.0, gt=0, description="saving one checkpoint")
    evaluation_timeout_seconds: float = Field(
        7200.0, gt=0, description="sampling and evaluating of one evaluation.every"
    )
    launcher_timeout_seconds: float = Field(
        60.0, gt=0, description="without a sign of life from promoe_ds.cli.launch"
    )


class LoggingConfig(Section):
    """What is recorded beside metrics.jsonl."""

    tensorboard: Switch = Field("auto", description="auto: on where it is installed")
    wandb: bool = Field(
        False, description="also to Weights & Biases, under its own environment variables"
    )
    wandb_project: str = Field("promoe_ds", min_length=1, description="where wandb puts the run")
    timestep_bins: int = Field(10, gt=0, description="equal bins of sigma in routing.jsonl")
    class_counts: Switch = Field(
        "auto",
        description="tokens by class and expert in routing.jsonl; auto: where the table is small",
    )
    position_counts: Switch = Field(
        "auto", description="tokens by patch and expert; auto: likewise"
    )
    counts_every: int | None = Field(
        None,
        gt=0,
        description=(
            "log intervals that one table by class or patch covers, and from one "
            "E x E matrix to the next; left out: 1 for up to 1,024 cells, else 20"
        ),
    )


class EvaluationConfig(Section):
    """The Fréchet distance of samples of the averaged weights to reference images, every so many
    steps.
    """

    every: int = Field(0, ge=0, description="steps; a multiple of train.log_every; 0: never")
    reference: str | None = Field(
        None, description="npz with mu and sigma (or arr_0), or folder of images"
    )
    extractor: str = Field(
        "inception",
        description="inception, pixels, or the path of a network: see docs/guides/evaluate.md",
    )
    samples: int = Field(
        5000, gt=1, description="drawn each time, always the same noise and labels"
    )
    batch_size: int = Field(64, gt=0, description="images a rank draws at once")
    steps: int | None = Field(None, gt=0, description="of the solver; sampling.steps if left out")
    cfg_scale: float = Field(1.0, ge=0, description="of classifier-free guidance; 1 is none")
    seed: int = Field(0, ge=0, lt=2**63, description="of noise and labels")

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        require(
            not self.every or self.reference is not None,
            f"every={self.every} needs a reference: the path of an npz or of a folder of images",
        )


class SamplingConfig(Section):
    """Defaults of `promoe_ds.cli.sample` for models of this recipe."""

    steps: int = Field(250, gt=0, description="of the solver")
    cfg_scale: float = Field(1.5, ge=0, description="of classifier-free guidance; 1 is none")
    solver: Literal["auto", "euler", "heun", "unipc", "dpmpp", "ddpm", "ddim"] = Field(
        "auto", description="auto: euler, or ddpm for objective=ddpm"
    )
