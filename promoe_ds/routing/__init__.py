"""Routing: pure functions and parameter-light routers. No process groups, no experts."""

from promoe_ds.routing.assignment import (
    Assignment,
    RoutingPlan,
    RoutingStats,
    assign_pairs,
    assign_token_choice,
)
from promoe_ds.routing.batch_pool import BatchPoolRouter
from promoe_ds.routing.classification import ClassificationRouter
from promoe_ds.routing.expert_choice import LinearExpertChoiceRouter, PrototypeExpertChoiceRouter
from promoe_ds.routing.hashing import HashRouter
from promoe_ds.routing.kmeans import KMeansRouter
from promoe_ds.routing.linear_gate import LinearGateRouter
from promoe_ds.routing.partition import Partition, partition_samples
from promoe_ds.routing.race import ExpertRaceRouter
from promoe_ds.routing.router import ROUTERS, Router, build_router
from promoe_ds.routing.two_step import TwoStepRouter

__all__ = [
    "ROUTERS",
    "Assignment",
    "BatchPoolRouter",
    "ClassificationRouter",
    "ExpertRaceRouter",
    "HashRouter",
    "KMeansRouter",
    "LinearExpertChoiceRouter",
    "LinearGateRouter",
    "Partition",
    "PrototypeExpertChoiceRouter",
    "Router",
    "RoutingPlan",
    "RoutingStats",
    "TwoStepRouter",
    "assign_pairs",
    "assign_token_choice",
    "build_router",
    "partition_samples",
]
