"""Small clusters, layouts and plans of four ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from promoe_ds.backends.devices import DEVICES
from promoe_ds.config import RunConfig
from promoe_ds.planning.cluster import Cluster, ClusterLayout
from promoe_ds.planning.planner import StepPlan, plan_step

from ..builders import small_config


def cluster(nodes: int = 1, gpus_per_node: int = 4, **device: Any) -> Cluster:
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=replace(DEVICES["h100"], **device),
        network_bandwidth=50e9,
    )


def layout(**fields: Any) -> ClusterLayout:
    return ClusterLayout(
        **{
            "world_size": 4,
            "micro_batch": 4,
            "zero_stage": 2,
            "precision": "fp32",
            "bucket": 1000,
            "overlap": False,
            **fields,
        }
    )


def config(**sections: dict) -> RunConfig:
    return small_config(
        **{"model": {"hidden_size": 32, "depth": 4}, "parallel": {"ep_size": 2}, **sections}
    )


def planned(run: RunConfig | None = None, on: Cluster | None = None, **fields: Any) -> StepPlan:
    return plan_step(run or config(), layout(**fields), on or cluster())
