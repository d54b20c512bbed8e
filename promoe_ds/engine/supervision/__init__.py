"""What watches a rank from inside: time-outs, its launcher, signals, broken exchanges."""

from promoe_ds.engine.supervision.supervisor import Supervisor, supervised

__all__ = ["Supervisor", "supervised"]
