#!/usr/bin/env python
"""`promoe-upcycle`, from a checkout."""

from promoe_ds.cli.upcycle import run

if __name__ == "__main__":
    run()
