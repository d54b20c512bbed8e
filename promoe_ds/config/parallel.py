"""The parallel section: how the experts lie over the ranks, what moves the tokens, what is
recomputed or compiled.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from promoe_ds.config.section import Section

ResolvedDispatch = Literal["local", "alltoall", "deepspeed_moe", "megatron"]
#: Layers of other libraries, which ask every token for K choices: methods in which experts choose
# cannot be expressed.
EXTERNAL_DISPATCH = ("deepspeed_moe", "megatron")


class ParallelConfig(Section):
    """How the experts lie over the ranks and what moves the tokens."""

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
        "auto", description="of the MoE layers; auto: triton for bf16 on a GPU that has Triton"
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
            "the experts of every layer lie over the ranks"
        ),
    )
    expert_order: tuple[tuple[int, ...], ...] | None = Field(
        None,
        description=(
            "of every MoE layer: what expert_placement said "
            "when it was loaded; not to be set, kept with the run"
        ),
    )

    @model_validator(mode="after")
    def _dispatch_fits(self) -> ParallelConfig:
        if self.dispatch == "local" and self.ep_size > 1:
            raise ValueError(
                f"dispatch=local keeps all experts on one rank, ep_size={self.ep_size} shards them:"
                " use dispatch=alltoall (or auto), or ep_size=1"
            )
        readers = {
            "capacity_factor": "deepspeed_moe",
            "megatron_dispatcher": "megatron",
            "comm_dtype": "alltoall",
        }
        for field, reader in readers.items():
            if self.resolved_dispatch != reader:
                self.refuse_set(
                    field, use=f"dispatch={self.resolved_dispatch} (it is read by {reader})"
                )
        if self.dispatch == "megatron":
            self._megatron_fits()
        return self

    def _megatron_fits(self) -> None:
        if self.expert_backend != "auto":
            raise ValueError(
                f"expert_backend={self.expert_backend} has no use for dispatch=megatron, which"
                " brings its own experts: leave it out"
            )
        if self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing=selective cannot reach inside Megatron's layer"
                " (dispatch=megatron): use full, or none"
            )
        if self.megatron_dispatcher == "flex" and self.ep_size == 1:
            raise ValueError(
                "megatron_dispatcher=flex needs several ranks that share experts: set ep_size above"
                " 1, or use alltoall"
            )

    @property
    def resolved_dispatch(self) -> ResolvedDispatch:
        """The dispatcher that `auto` stands for."""
        if self.dispatch == "auto":
            return "alltoall" if self.ep_size > 1 else "local"
        return self.dispatch

    @property
    def expert_storage(self) -> Literal["local", "deepspeed"]:
        """How the shards of a checkpoint hold the experts: all paths but `local` store them as
        DeepSpeed does.
        """
        return "local" if self.resolved_dispatch == "local" else "deepspeed"
