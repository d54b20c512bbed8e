"""Run on a host by ssh: what the launcher must know of it before it starts ranks there."""

from __future__ import annotations

import json
import sys

from promoe_ds.launch.network import local_interfaces, resolve


def main() -> None:
    """Answer the request on standard input: {"names": [...]}."""
    request = json.load(sys.stdin)
    sys.stdout.write(json.dumps({"interfaces": local_interfaces(), "addresses": resolve(request["names"])}) + "\n")


if __name__ == "__main__":
    main()
