"""Expert load from routing.jsonl: totals, arrays, findings, placements, and the report."""

from promoe_ds.analysis.expert_load.lines import read_routing_log
from promoe_ds.analysis.expert_load.log import RoutingLog, load_log
from promoe_ds.analysis.expert_load.totals import LayerLoad, summarise_load

__all__ = ["LayerLoad", "RoutingLog", "load_log", "read_routing_log", "summarise_load"]
