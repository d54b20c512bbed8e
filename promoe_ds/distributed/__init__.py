"""Ranks and process groups under any launcher; which rank is on which host."""
