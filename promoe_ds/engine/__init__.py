"""Running it: the one room that imports deepspeed."""
