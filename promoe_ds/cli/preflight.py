"""Check every host before a launch: another name of `promoe_ds.cli.launch --check-only`."""

from promoe_ds.cli import launch
from promoe_ds.cli.entry import command


def main(arguments: list[str]) -> None:
    """Check the hosts of a job; takes the arguments of promoe_ds.cli.launch."""
    launch.main(["--check-only", *arguments])


run = command(main)

if __name__ == "__main__":
    run()
