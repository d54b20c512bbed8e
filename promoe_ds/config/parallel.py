"""The sections about devices: how the experts are placed on the ranks, what moves the tokens, what
is recomputed or compiled (parallel); in which numbers, with whose kernels (precision).
"""

from typing import Literal

from pydantic import Field

from promoe_ds.config.section import Section, require

ResolvedDispatch = Literal["local", "alltoall", "deepspeed_moe", "megatron"]
#: Layers of other libraries, which ask every token for K choices: methods in which experts choose
# cannot be expressed.
EXTERNAL_DISPATCH = ("deepspeed_moe", "megatron")
#: Fields that one dispatch alone reads.
_READERS = {
    "capacity_factor": "deepspeed_moe",
    "megatron_dispatcher": "megatron",
    "comm_dtype": "alltoall",
}

Fp8Recipe = Literal["delayed", "current", "block", "mxfp8"]


class ParallelConfig(Section):
    """How the experts are placed on the ranks and what moves the tokens."""

    ep_size: int = Field(1, gt=0, description="ranks that share one set of routed experts")
    dispatch: Literal["auto", ResolvedDispatch] = Field(
        "auto", description="auto: alltoall when ep_size > 1, else local"
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description=(
            "of deepspeed_moe: slots over an even share, rows "
            "beyond them are dropped; none: as many as needed"
        ),
    )
    megatron_dispatcher: Literal["alltoall", "allgather", "flex"] = Field(
        "alltoall", description="flex is DeepEP's"
    )
    comm_dtype: Literal["same", "bf16", "fp8"] = Field(
        "same", description="of the rows between ranks (dispatch=alltoall)"
    )
    expert_groups: Literal["any", "node"] = Field(
        "any", description="node: refuse an expert group that spans hosts"
    )
    kernels: Literal["auto", "eager", "triton"] = Field(
        "auto", description="MoE layers, norms, update; auto: triton for bf16 on GPUs with Triton"
    )
    expert_backend: Literal["auto", "grouped_mm", "loop"] = Field(
        "auto", description="auto: grouped_mm where the widths and, on a GPU, its kernels allow it"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="selective: hidden layers of feed-forwards and experts; full: all but routing",
    )
    compile: bool = Field(
        False,
        description="torch.compile attention and feed-forwards; routing and exchange stay eager",
    )
    timeout_seconds: float = Field(600.0, gt=0, description="of every collective")
    expert_placement: str | None = Field(
        None,
        description=(
            "file of promoe-load: at the next resume, the order in which "
            "the experts of every layer are placed on the ranks"
        ),
    )
    expert_order: tuple[tuple[int, ...], ...] | None = Field(
        None,
        description=(
            "of every MoE layer: what expert_placement said "
            "when it was loaded; not to be set, kept with the run"
        ),
    )

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        require(
            self.dispatch != "local" or self.ep_size == 1,
            f"dispatch=local keeps all experts on one rank, ep_size={self.ep_size} shards them: use"
            " dispatch=alltoall (or auto), or ep_size=1",
        )
        for field, reader in _READERS.items():
            if self.resolved_dispatch != reader:
                self.refuse_set(
                    field, use=f"dispatch={self.resolved_dispatch} (it is read by {reader})"
                )
        if self.dispatch == "megatron":
            self.refuse_set("expert_backend", use="dispatch=megatron, which brings its own experts")
            require(
                self.activation_checkpointing != "selective",
                "activation_checkpointing=selective cannot reach inside Megatron's layer"
                " (dispatch=megatron): use full, or none",
            )
            require(
                self.megatron_dispatcher != "flex" or self.ep_size > 1,
                "megatron_dispatcher=flex needs several ranks that share experts: set ep_size above"
                " 1, or use alltoall",
            )

    @property
    def resolved_dispatch(self) -> ResolvedDispatch:
        """The dispatcher that `auto` means."""
        if self.dispatch == "auto":
            return "alltoall" if self.ep_size > 1 else "local"
        return self.dispatch

    @property
    def expert_storage(self) -> Literal["local", "deepspeed"]:
        """How the shards of a checkpoint hold the experts: all paths but `local` store them as
        DeepSpeed does.
        """
        return "local" if self.resolved_dispatch == "local" else "deepspeed"


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

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        if self.compute != "fp8":
            self.refuse_set("fp8_recipe", use=f"compute={self.compute}, only for fp8")
        require(
            self.compute != "fp8" or self.kernels != "torch",
            "kernels=torch has no FP8 path (compute=fp8): use kernels=transformer_engine, or"
            " compute=bf16",
        )
        require(
            self.compute != "bf16_autocast" or self.kernels != "transformer_engine",
            "compute=bf16_autocast casts for torch's products (kernels=transformer_engine): leave"
            " kernels out, or use compute=bf16",
        )

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
