"""Thin entries: arguments to config to engine."""
