"""Latents of several sizes: one folder of packed latents a size, one size a batch."""
