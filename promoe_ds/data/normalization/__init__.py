"""What latents are normalised by: the value, how it is measured, chosen and checked."""
