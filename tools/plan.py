#!/usr/bin/env python
"""`promoe-plan`, from a checkout."""

from promoe_ds.cli.plan import run

if __name__ == "__main__":
    run()
