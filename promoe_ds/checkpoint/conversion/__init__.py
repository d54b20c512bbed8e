"""Checkpoints from any format into any other: readers, writers, and the walk between them."""

from promoe_ds.checkpoint.conversion.convert import Conversion, Request, convert
from promoe_ds.checkpoint.conversion.upcycling import UpcycleRequest, upcycle

__all__ = ["Conversion", "Request", "UpcycleRequest", "convert", "upcycle"]
