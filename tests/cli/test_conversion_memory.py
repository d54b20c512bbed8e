"""A conversion's memory does not grow with the model: the bound that docs/measured/performance.md
states, measured on a real process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.checkpoint import write_checkpoint
from promoe_ds.config import load_config

from .commands import REPOSITORY, run


def test_conversion_of_everything_keeps_to_the_memory_bound(tmp_path: Path) -> None:
    """Take 1.2 GB of eight ranks: half of it in memory would be too much."""
    checkpoint = write_checkpoint(
        load_config("promoe_s", ["parallel.ep_size=4"]), tmp_path, ranks=8
    )
    sizes = [path.stat().st_size for path in checkpoint.iterdir()]
    allowed = 1.5 * max(sizes) + 600 * 10**6
    assert sum(sizes) > 1.5 * allowed
    script, target = "tools/convert_checkpoint.py", str(tmp_path / "single")
    command = (script, str(checkpoint), target, "--to", "single", "--with-optimizer")
    # A process's peak counts what it was forked from: this one, which may be large. A small one
    # is between.
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
        " stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = run(sys.executable, "-c", between, sys.executable, *command, cwd=REPOSITORY, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= allowed
