"""What a run is: frozen, validated, free of torch.

Every field that a recipe may set stands once, here or in the file of its section. Unknown keys are
errors (`loader` adds the nearest valid name). Sizes that cannot work are refused here, before
anything is allocated.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from promoe_ds.config.data import DataConfig
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.config.evaluation import EvaluationConfig
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.config.parallel import EXTERNAL_DISPATCH, ParallelConfig
from promoe_ds.config.precision import PrecisionConfig, fp8_multiple
from promoe_ds.config.presets import PRESETS
from promoe_ds.config.routing import METHODS, RoutingConfig
from promoe_ds.config.section import Section, Switch
from promoe_ds.config.supervision import SupervisionConfig

#: Grouped GEMM wants rows of a multiple of 16 bytes: eight numbers of bf16.
_GROUPED_GEMM_MULTIPLE = 8

#: Cells of a table that is written at every log step unasked; and in how many a larger one is.
_SMALL_TABLE, _LARGE_TABLE_EVERY = 1024, 20


class ModelConfig(Section):
    """The diffusion transformer's sizes (Peebles & Xie, 2023; ProMoE Table 2)."""

    preset: Literal["s", "b", "l", "xl"] | None = Field(
        None, description="fills the sizes left out"
    )
    input_size: int = Field(32, gt=0, description="height and width of a latent, in latent pixels")
    patch_size: int = Field(2, gt=0, description="side of a patch, which is one token")
    in_channels: int = Field(4, gt=0, description="of a latent")
    hidden_size: int = Field(gt=0, description="width D")
    depth: int = Field(gt=0, description="blocks")
    num_heads: int = Field(gt=0, description="of attention; divides D")
    mlp_ratio: float = Field(4.0, gt=0, description="width of a dense feed-forward over D")
    qk_norm: bool = Field(False, description="normalise queries and keys of every head")
    learn_sigma: bool = Field(
        True, description="twice the channels out; the first half is the prediction"
    )
    num_classes: int = Field(1000, gt=0, description="the null label is num_classes")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: object) -> object:
        if (
            isinstance(values, dict)
            and isinstance(preset := values.get("preset"), str)
            and preset in PRESETS
        ):
            return {**PRESETS[preset], **values}
        return values

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 (sin-cos positions)"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide input_size={self.input_size}"
            )
        return self

    @property
    def null_label(self) -> int:
        """The label that stands for «no condition»."""
        return self.num_classes

    @property
    def tokens_per_image(self) -> int:
        """S: patches of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return self.in_channels * (2 if self.learn_sigma else 1)


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
        False, description="write checkpoints while training goes on, from a copy in host memory"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of weights, order of the data, noise and label dropout"
    )
    max_nonfinite_steps: int = Field(3, gt=0, description="skipped in a row before the run stops")


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


class SamplingConfig(Section):
    """Defaults of `promoe_ds.cli.sample` for models of this recipe."""

    steps: int = Field(250, gt=0, description="of the solver")
    cfg_scale: float = Field(1.5, ge=0, description="of classifier-free guidance; 1 is none")
    solver: Literal["auto", "euler", "heun", "unipc", "dpmpp", "ddpm", "ddim"] = Field(
        "auto", description="auto: euler, or ddpm for objective=ddpm"
    )


class RunConfig(Section):
    """One run, whole. Saved in the run directory and inside every checkpoint and export."""

    name: str = Field(
        min_length=1,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="of the run; in a recipe, the file's name if left out",
    )
    model: ModelConfig
    routing: RoutingConfig = RoutingConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    supervision: SupervisionConfig = SupervisionConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.routing.method == "dense":
            if self.parallel.resolved_dispatch != "local":
                raise ValueError(
                    "parallel.ep_size and parallel.dispatch shard experts, but routing.method=dense"
                    " has none: set parallel.ep_size=1"
                )
        else:
            if (
                self.routing.method == "ec_dit"
                and self.model.tokens_per_image * self.routing.top_k < self.routing.num_experts
            ):
                raise ValueError(
                    f"routing.top_k={self.routing.top_k} of {self.model.tokens_per_image} tokens"
                    f" per image gives each of routing.num_experts={self.routing.num_experts}"
                    " experts less than one token (method=ec_dit): raise top_k or lower"
                    " num_experts"
                )
            if self.routing.num_experts % self.parallel.ep_size:
                raise ValueError(
                    f"parallel.ep_size={self.parallel.ep_size} does not divide "
                    f"routing.num_experts={self.routing.num_experts}: every rank holds equally many"
                )
            if self.parallel.expert_backend == "grouped_mm" and not self._grouped_gemm_fits:
                raise ValueError(
                    "parallel.expert_backend=grouped_mm needs rows of a multiple of 16 bytes:"
                    f" model.hidden_size={self.model.hidden_size} and the expert width"
                    f" {self.expert_width} must be multiples of {_GROUPED_GEMM_MULTIPLE}; change"
                    " them or use loop"
                )
            if (
                self.parallel.dispatch in EXTERNAL_DISPATCH
                and not self.routing.traits.tokens_choose
            ):
                others = ", ".join(
                    name
                    for name, method in METHODS.items()
                    if method.tokens_choose and name != "dense"
                )
                raise ValueError(
                    f"parallel.dispatch={self.parallel.dispatch} asks every token for routing.top_k"
                    f" experts, but with routing.method={self.routing.method} experts choose: use"
                    f" parallel.dispatch=alltoall, or one of the methods {others}"
                )
        if self.data.dataset == "digits":
            self._digits_fit()
        if self.evaluation.every % self.train.log_every:
            raise ValueError(
                f"evaluation.every={self.evaluation.every} must be a multiple of train.log_every="
                f"{self.train.log_every}: its figures are part of a log line"
            )
        return self

    @model_validator(mode="after")
    def _precision_fits(self) -> RunConfig:
        if self.precision.uses_transformer_engine and self.parallel.compile:
            raise ValueError(
                "parallel.compile=true cannot look into Transformer Engine's layers"
                " (precision.kernels): switch one of them off"
            )
        if (
            self.precision.compute == "bf16_autocast"
            and self.parallel.dispatch in EXTERNAL_DISPATCH
        ):
            raise ValueError(
                f"parallel.dispatch={self.parallel.dispatch} brings a layer that autocast does not"
                " reach (precision.compute=bf16_autocast): use parallel.dispatch=alltoall, or"
                " precision.compute=bf16"
            )
        if self.precision.compute != "fp8":
            return self
        multiple, misfit = (
            fp8_multiple(self.precision.fp8_recipe),
            self.fp8_misfit(fp8_multiple(self.precision.fp8_recipe)),
        )
        if misfit is not None:
            asked = (
                f"fp8_recipe={self.precision.fp8_recipe}"
                if multiple > fp8_multiple("auto")
                else "compute=fp8"
            )
            raise ValueError(
                f"precision.{asked} needs widths of a multiple of {multiple}, but {misfit}: change"
                " it, or use bf16"
            )
        return self

    def fp8_misfit(self, multiple: int) -> str | None:
        """Return which width is no multiple, as «name is width»; None if all are."""
        widths = {
            "model.hidden_size": self.model.hidden_size,
            "the dense width (model.mlp_ratio)": int(self.model.mlp_ratio * self.model.hidden_size),
        }
        if self.routing.method != "dense":
            widths |= {
                "routing.expert_width": self.expert_width,
                "routing.shared_expert_width": self.shared_expert_width,
            }
        return next(
            (f"{name} is {width}" for name, width in widths.items() if width % multiple), None
        )

    @model_validator(mode="after")
    def _objective_fits(self) -> RunConfig:
        if self.diffusion.objective == "ddpm" and not self.model.learn_sigma:
            raise ValueError(
                "diffusion.objective=ddpm learns the variance, but model.learn_sigma=false has no"
                " channels for it: set model.learn_sigma=true"
            )
        problem = self.diffusion.sampling_problem(
            solver=self.sampling.solver, steps=self.sampling.steps
        )
        if problem:
            raise ValueError(f"sampling.{problem}")
        return self

    @property
    def resolved_solver(self) -> str:
        """The sampler that `sampling.solver` stands for."""
        return self.diffusion.solvers[0] if self.sampling.solver == "auto" else self.sampling.solver

    @property
    def _grouped_gemm_fits(self) -> bool:
        return (
            self.model.hidden_size % _GROUPED_GEMM_MULTIPLE == 0
            and self.expert_width % _GROUPED_GEMM_MULTIPLE == 0
        )

    @property
    def expert_backend(self) -> Literal["grouped_mm", "loop"]:
        """The backend that `parallel.expert_backend` stands for; auto: grouped GEMM where the
        widths allow it.
        """
        if self.parallel.expert_backend == "auto":
            return "grouped_mm" if self._grouped_gemm_fits else "loop"
        return self.parallel.expert_backend

    @property
    def experts_by(self) -> str:
        """Who computes routed experts: Megatron, Transformer Engine, or our own backend."""
        if self.parallel.resolved_dispatch == "megatron":
            return "megatron"
        return (
            "transformer_engine" if self.precision.uses_transformer_engine else self.expert_backend
        )

    def _digits_fit(self) -> None:
        if (self.model.input_size, self.model.in_channels) != (8, 1):
            raise ValueError(
                "data.dataset=digits has 8x8 images of one channel, but model.input_size="
                f"{self.model.input_size} and model.in_channels={self.model.in_channels}"
            )
        if self.model.num_classes < 10:
            raise ValueError(
                "data.dataset=digits has the labels 0..9, but"
                f" model.num_classes={self.model.num_classes}: set model.num_classes=10"
            )

    def expert_order_of(self, row: int) -> tuple[int, ...] | None:
        """Return the first names of the experts of the row-th MoE layer, in the order in which they
        lie; None if unchanged.
        """
        return None if self.parallel.expert_order is None else self.parallel.expert_order[row]

    @property
    def counts_classes(self) -> bool:
        """Whether routing.jsonl gets tokens by class and expert."""
        return self._counts(self.logging.class_counts, self.model.num_classes)

    @property
    def counts_positions(self) -> bool:
        """Whether routing.jsonl gets tokens by patch and expert."""
        return self._counts(self.logging.position_counts, self.model.tokens_per_image)

    def counts_every(self, cells: int) -> int:
        """Log intervals from one table of so many cells to the next in routing.jsonl."""
        return self.logging.counts_every or (1 if cells <= _SMALL_TABLE else _LARGE_TABLE_EVERY)

    def _counts(self, setting: str | bool, rows: int) -> bool:
        return (
            rows * self.routing.num_experts <= _SMALL_TABLE if setting == "auto" else bool(setting)
        )

    @property
    def expert_width(self) -> int:
        """F: hidden width of one routed or unconditional expert; by default, one and the shared
        ones are a dense layer's.
        """
        dense = int(self.model.mlp_ratio * self.model.hidden_size)
        return self.routing.expert_width or max(1, dense // (1 + self.routing.num_shared_experts))

    @property
    def shared_expert_width(self) -> int:
        """Hidden width of one shared expert."""
        return self.routing.shared_expert_width or self.expert_width

    @property
    def shared_expert_type(self) -> Literal["gelu", "swiglu"]:
        """Type of the shared experts."""
        return self.routing.shared_expert_type or self.routing.expert_type

    @property
    def target_patch_values(self) -> int:
        """P: values of a patch of the training target, which a router under per-layer
        regularisation predicts; 0 without.
        """
        if self.routing.method != "expert_race" or self.routing.per_layer_weight == 0:
            return 0
        return self.model.in_channels * self.model.patch_size**2

    def is_moe_block(self, index: int) -> bool:
        """Whether block `index` (from 0) holds experts: the odd ones under `interleave`, else
        all.
        """
        if self.routing.method == "dense":
            return False
        return self.routing.moe_blocks == "all" or index % 2 == 1

    @property
    def moe_block_indices(self) -> tuple[int, ...]:
        """Indices of the blocks that hold experts."""
        return tuple(i for i in range(self.model.depth) if self.is_moe_block(i))
