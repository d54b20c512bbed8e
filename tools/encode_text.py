#!/usr/bin/env python
"""`promoe-encode-text`, from a checkout."""

from promoe_ds.cli.encode_text import run

if __name__ == "__main__":
    run()
