"""Judging images: sampling from exports, metrics."""
