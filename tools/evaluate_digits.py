#!/usr/bin/env python
"""`promoe-evaluate-digits`, from a checkout."""

from promoe_ds.cli.evaluate_digits import run

if __name__ == "__main__":
    run()
