"""Saving, loading, resharding and converting checkpoints."""
