"""Texts beside packed latents: captions as people keep them, encoded and packed, and drawn."""
