#!/usr/bin/env python
"""`promoe-load`, from a checkout."""

from promoe_ds.cli.expert_load import run

if __name__ == "__main__":
    run()
