"""Check every host before a launch: `python -m promoe_ds.cli.preflight --hostfile H -- --recipe NAME ...`.

It takes the arguments of promoe_ds.cli.launch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from promoe_ds.cli.entry import run_entry
from promoe_ds.cli.launch import parse_arguments
from promoe_ds.cli.train import parse_arguments as parse_train_arguments
from promoe_ds.errors import LaunchError
from promoe_ds.launch.preflight.checks import finding_lines, run_preflight
from promoe_ds.launch.preflight.links import link_table, slow_links
from promoe_ds.logs import configure_logging


def main(arguments: Sequence[str]) -> None:
    """Arguments to checks to a report on standard output; findings are the error."""
    configure_logging(0)
    job = parse_arguments(arguments, prog="promoe_ds.cli.preflight",
                          purpose="Check every host before a launch; takes that command's arguments.")
    report = run_preflight(job, parse_train_arguments(job.arguments).deepspeed_config)
    if report.links:
        slow = slow_links(report.links)
        sys.stdout.write("\n".join(link_table(report.links)) + "\n")
        sys.stdout.write("slow links:\n" + "\n".join(link_table(slow)) + "\n" if slow else "no link is slower than the others\n")
    if report.findings:
        lines = finding_lines(report.findings)
        title = f"pre-flight: {len(lines)} problem{'s' * (len(lines) > 1)}"
        raise LaunchError("\n  ".join([title, *lines]))
    sys.stdout.write(f"pre-flight: {len(job.hosts)} hosts, {report.ranks} ranks, interface {report.interface}: sound\n")


run = partial(run_entry, main)

if __name__ == "__main__":
    run()
