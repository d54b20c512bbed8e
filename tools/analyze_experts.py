#!/usr/bin/env python
"""`promoe-experts`, from a checkout."""

from promoe_ds.cli.analyze_experts import run

if __name__ == "__main__":
    run()
