"""Evaluating images: sampling from exports, metrics."""
