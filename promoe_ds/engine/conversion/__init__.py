"""Checkpoints from any format into any other: readers, writers, and the walk between them."""

from promoe_ds.engine.conversion.convert import Conversion, Request, convert

__all__ = ["Conversion", "Request", "convert"]
