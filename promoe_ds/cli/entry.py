"""What every entry shares: one readable message and an exit code for errors that a user can fix."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from promoe_ds.errors import Interrupted, PromoeError
from promoe_ds.launch.heartbeat import write_rank_status
from promoe_ds.logs import configure_logging, rank_from_environment

_HEAD_START_SECONDS = 5.0


def command(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Return what a console script calls."""
    return partial(run_entry, main)


def run_entry(main: Callable[[list[str]], None]) -> None:
    """Run `main` with the command line; turn a `PromoeError` into one message and its exit code.

    Rank 0 reports a mistake that all ranks find; its end makes the launcher end the others. A rank
    that still runs some seconds later found something that rank 0 did not, and reports it. Any
    other exception keeps its traceback: it is a defect, not a mistake of the user.
    """
    rank = rank_from_environment()
    configure_logging(rank)
    try:
        main(sys.argv[1:])
        write_rank_status(0, "finished")
        gc.freeze()  # the interpreter's end looks for garbage among all modules, for seconds
    except (PromoeError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, PromoeError) else Interrupted("by Ctrl-C")
        write_rank_status(error.exit_code, str(error))
        if rank > 0:
            time.sleep(_HEAD_START_SECONDS)
        place = "" if rank == 0 else f"rank {rank}: "
        sys.stderr.write(f"{error.kind}: {place}{error}\n")
        _end_at_once(error.exit_code)
    except SystemExit as ending:  # of the command line's parser, which printed why
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        write_rank_status(code, "see the output")
        raise
    except Exception as error:
        write_rank_status(1, f"{type(error).__name__}: {error}")
        if not _has_peers():
            raise
        traceback.print_exc()
        _end_at_once(1)


def _end_at_once(code: int) -> None:
    """End without the interpreter's shutdown: a collective of another library, or a GPU's kernels,
    which wait for other ranks, would keep this process alive.
    """
    with suppress(OSError):  # whoever read it is gone
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_peers() -> bool:
    """Whether this process is in a group of several; torch is not imported for the answer."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined_processes(device: str | None) -> Iterator[Any]:
    """Join the processes that a launcher started, if one did; give the `DistributedContext`.

    An error leaves them joined: its process ends at once.
    """
    from promoe_ds.distributed.context import join_processes
    from promoe_ds.distributed.process_group import stop_distributed

    yield join_processes(device)
    stop_distributed()
