#!/usr/bin/env python
"""`promoe-encode`, from a checkout."""

from promoe_ds.cli.encode_latents import run

if __name__ == "__main__":
    run()
