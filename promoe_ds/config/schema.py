"""What a run is: frozen, validated, free of torch.

Every field that a recipe may set is declared once, in the file of its section. Unknown keys are
errors (`loader` adds the nearest valid name). Sizes that cannot work are refused here, before
anything is allocated.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from promoe_ds.config.data import DataConfig
from promoe_ds.config.diffusion import DiffusionConfig
from promoe_ds.config.model import ModelConfig
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.config.parallel import (
    EXTERNAL_DISPATCH,
    ParallelConfig,
    PrecisionConfig,
    fp8_multiple,
)
from promoe_ds.config.routing import METHODS, RoutingConfig
from promoe_ds.config.run_sections import (
    EvaluationConfig,
    LoggingConfig,
    SamplingConfig,
    SupervisionConfig,
    TrainConfig,
)
from promoe_ds.config.section import Section, require

#: Grouped GEMM wants rows of a multiple of 16 bytes: eight numbers of bf16.
_GROUPED_GEMM_MULTIPLE = 8

#: Cells of a table that is written at every log step unasked; and in how many a larger one is.
_SMALL_TABLE, _LARGE_TABLE_EVERY = 1024, 20


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

    @model_validator(mode="before")
    @classmethod
    def _fill_block(cls, values: Any) -> Any:
        """Make the experts of a modern block SwiGLU where nothing is said of them."""
        sections = values if isinstance(values, Mapping) else {}
        model, routing = sections.get("model"), sections.get("routing", {})
        is_modern = isinstance(model, Mapping) and model.get("block") == "modern"
        if not (is_modern and isinstance(routing, Mapping)):
            return values
        return {**values, "routing": {"expert_type": "swiglu", **routing}}

    def check(self) -> None:
        """Refuse sections that contradict each other."""
        model, precision = self.model, self.precision
        if self.routing.method == "dense":
            require(
                self.parallel.resolved_dispatch == "local",
                "parallel.ep_size and parallel.dispatch shard experts, but routing.method=dense has"
                " none: set parallel.ep_size=1",
            )
        else:
            self._check_experts()
        self._check_condition()
        self._check_data()
        require(
            self.evaluation.every % self.train.log_every == 0,
            f"evaluation.every={self.evaluation.every} must be a multiple of train.log_every="
            f"{self.train.log_every}: its figures are part of a log line",
        )
        require(
            not (precision.uses_transformer_engine and self.parallel.compile),
            "parallel.compile=true cannot look into Transformer Engine's layers"
            " (precision.kernels): switch one of them off",
        )
        multiple = fp8_multiple(precision.fp8_recipe)
        misfit = self.fp8_misfit(multiple)
        require(
            precision.compute != "fp8" or misfit is None,
            f"precision.compute=fp8 with fp8_recipe={precision.fp8_recipe} needs widths of a"
            f" multiple of {multiple}, but {misfit}: change it, or use bf16",
        )
        require(
            self.diffusion.objective != "ddpm" or model.learn_sigma,
            "diffusion.objective=ddpm learns the variance, but model.learn_sigma=false has no"
            " channels for it: set model.learn_sigma=true",
        )
        require(
            self.diffusion.objective == "rectified_flow" or model.time == "noise",
            f"model.time={model.time} is a flow's, but diffusion.objective="
            f"{self.diffusion.objective}: set model.time=noise",
        )
        problem = self.diffusion.sampling_problem
        sampling = problem(solver=self.sampling.solver, steps=self.sampling.steps)
        require(not sampling, f"sampling.{sampling}")
        evaluation = problem(steps=self.evaluation.steps) if self.evaluation.every else ""
        require(not evaluation, f"evaluation.{evaluation}")

    def _check_data(self) -> None:
        model, data, traits = self.model, self.data, self.data.traits
        if traits.size is not None:
            side, channels = traits.size
            require(
                (model.input_size, model.in_channels, model.buckets) == (side, channels, ()),
                f"data.dataset={data.dataset} has {side}x{side} pixels of {channels} channels, but"
                f" model.input_size={model.input_size}, model.buckets={list(model.buckets)} and"
                f" model.in_channels={model.in_channels}",
            )
        for field in ("latents_mean", "latents_std"):
            require(
                len(values := getattr(data, field)) in (0, 1, model.in_channels),
                f"data.{field} has {len(values)} values, but model.in_channels="
                f"{model.in_channels}: state one, or one a channel",
            )
        require(
            not model.buckets or traits.several_sizes,
            f"model.buckets needs latents packed by size (data.dataset=latents), but"
            f" data.dataset={data.dataset}: leave it out, or encode with --buckets",
        )
        require(
            model.num_classes >= traits.classes,
            f"data.dataset={data.dataset} has the labels 0..{traits.classes - 1}, but"
            f" model.num_classes={model.num_classes}: set model.num_classes={traits.classes}",
        )

    def _check_condition(self) -> None:
        conditions, condition = self.data.traits.conditions, self.model.condition
        require(
            condition in conditions,
            f"data.dataset={self.data.dataset} has no samples for model.condition={condition}: set"
            f" model.condition={conditions[0]}, or use another data set",
        )
        if condition == "class":
            self._check_null_row()
            texts = "text_encoder", "text_fingerprint", "caption_groups"
            self.data.refuse_set(*texts, use="model.condition=class", section="data.")
        require(
            self.logging.class_counts is not True or self.num_groups > 0,
            "logging.class_counts=true has nothing to count by: set data.caption_groups, or leave"
            " it out",
        )

    def _check_null_row(self) -> None:
        experts = 0 if self.routing.method == "dense" else self.routing.num_unconditional_experts
        for name, value in (
            ("diffusion.label_dropout", self.diffusion.label_dropout),
            ("routing.num_unconditional_experts", experts),
        ):
            require(
                self.model.null_row or value == 0,
                f"{name}={value:g} is for samples of the null label, which model.null_row=false"
                f" leaves out: set {name}=0, or model.null_row=true",
            )

    def _check_experts(self) -> None:
        model, routing, parallel = self.model, self.routing, self.parallel
        precision = self.precision
        require(
            routing.method != "ec_dit"
            or model.fewest_tokens * routing.top_k >= routing.num_experts,
            f"routing.top_k={routing.top_k} of {model.fewest_tokens} tokens per image gives each"
            f" of routing.num_experts={routing.num_experts} experts less than one token"
            " (method=ec_dit): raise top_k or lower num_experts",
        )
        require(
            routing.num_experts % parallel.ep_size == 0,
            f"parallel.ep_size={parallel.ep_size} does not divide routing.num_experts="
            f"{routing.num_experts}: every rank holds equally many",
        )
        require(
            parallel.expert_backend != "grouped_mm" or self._grouped_gemm_fits,
            "parallel.expert_backend=grouped_mm needs rows of a multiple of 16 bytes:"
            f" model.hidden_size={model.hidden_size} and the expert width {self.expert_width} must"
            f" be multiples of {_GROUPED_GEMM_MULTIPLE}; change them or use loop",
        )
        choosing = [
            name for name, each in METHODS.items() if each.tokens_choose and name != "dense"
        ]
        require(
            parallel.dispatch not in EXTERNAL_DISPATCH or routing.traits.tokens_choose,
            f"parallel.dispatch={parallel.dispatch} asks every token for routing.top_k experts, but"
            f" with routing.method={routing.method} experts choose: use parallel.dispatch=alltoall,"
            f" or one of the methods {', '.join(choosing)}",
        )
        require(
            precision.compute != "bf16_autocast" or parallel.dispatch not in EXTERNAL_DISPATCH,
            f"parallel.dispatch={parallel.dispatch} brings a layer that autocast does not reach"
            " (precision.compute=bf16_autocast): use parallel.dispatch=alltoall, or"
            " precision.compute=bf16",
        )

    def fp8_misfit(self, multiple: int) -> str | None:
        """Return which width is no multiple, as «name is width»; None if all are."""
        widths = {
            "model.hidden_size": self.model.hidden_size,
            "model.num_heads * model.head_dim": self.model.attention_width,
        }
        num_moe_blocks = len(self.moe_block_indices)
        if num_moe_blocks < self.model.depth:
            widths["the dense width (model.mlp_ratio)"] = self.dense_width
        if num_moe_blocks > 0:
            widths |= {
                "routing.expert_width": self.expert_width,
                "routing.shared_expert_width": self.shared_expert_width,
            }
        if self.model.condition == "text":
            widths["model.text_width"] = self.model.text_width
        return next(
            (f"{name} is {width}" for name, width in widths.items() if width % multiple), None
        )

    @property
    def resolved_solver(self) -> str:
        """The sampler that `sampling.solver` means."""
        return self.diffusion.solvers[0] if self.sampling.solver == "auto" else self.sampling.solver

    @property
    def _grouped_gemm_fits(self) -> bool:
        return (
            self.model.hidden_size % _GROUPED_GEMM_MULTIPLE == 0
            and self.expert_width % _GROUPED_GEMM_MULTIPLE == 0
        )

    @property
    def expert_backend(self) -> Literal["auto", "grouped_mm", "loop"]:
        """What `parallel.expert_backend` leaves to the device: auto only where the widths allow
        grouped GEMM.
        """
        return self.parallel.expert_backend if self._grouped_gemm_fits else "loop"

    def expert_order_of(self, row: int) -> tuple[int, ...] | None:
        """Return the first names of the experts of the row-th MoE layer in the order of their
        places; None if unchanged.
        """
        return None if self.parallel.expert_order is None else self.parallel.expert_order[row]

    @property
    def num_groups(self) -> int:
        """Groups that statistics sort samples by, without null: classes, or groups of captions."""
        if self.model.condition == "text":
            return self.data.caption_groups
        return self.model.num_classes

    @property
    def groups_field(self) -> str:
        """The field that says how many groups there are."""
        return "data.caption_groups" if self.model.condition == "text" else "model.num_classes"

    @property
    def counts_classes(self) -> bool:
        """Whether routing.jsonl gets tokens by class, or group of captions, and expert."""
        return self.num_groups > 0 and self._counts(self.logging.class_counts, self.num_groups)

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
    def dense_width(self) -> int:
        """Hidden width of a dense feed-forward."""
        return self.model.hidden_width(self.model.mlp_type)

    @property
    def expert_width(self) -> int:
        """F: hidden width of one routed or unconditional expert; by default, one and the shared
        ones are a dense layer's.
        """
        routing = self.routing
        parts = 1 + routing.num_shared_experts
        return routing.expert_width or self.model.hidden_width(routing.expert_type, parts)

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
