"""What a run will need and how fast it may be, before it starts: shapes traced through the real layers, no data, no weights."""

from promoe_ds.analysis.plan.cluster import Cluster, Layout, fake_world, layout_of
from promoe_ds.analysis.plan.planner import StepPlan, plan_step
from promoe_ds.analysis.plan.search import Choice, best_layout

__all__ = ["Choice", "Cluster", "Layout", "StepPlan", "best_layout", "fake_world", "layout_of", "plan_step"]
