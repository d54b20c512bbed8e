#!/usr/bin/env python
"""`promoe-convert`, from a checkout."""

from promoe_ds.cli.convert_checkpoint import run

if __name__ == "__main__":
    run()
