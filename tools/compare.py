#!/usr/bin/env python
"""`promoe-compare`, from a checkout."""

from promoe_ds.cli.compare import run

if __name__ == "__main__":
    run()
