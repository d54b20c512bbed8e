"""Routing: pure functions and parameter-light routers. No process groups, no experts."""

from promoe_ds.routing.assignment import Assignment, RoutingPlan, RoutingStats, assign_token_choice
from promoe_ds.routing.partition import Partition, partition_samples
from promoe_ds.routing.two_step import TwoStepRouter

__all__ = ["Assignment", "Partition", "RoutingPlan", "RoutingStats", "TwoStepRouter", "assign_token_choice", "partition_samples"]
