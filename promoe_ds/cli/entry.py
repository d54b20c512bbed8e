"""What every entry shares: one readable message and an exit code for errors that a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from promoe_ds.errors import PromoeError
from promoe_ds.logs import rank_from_environment


def run_entry(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main` with the command line; turn a `PromoeError` into a message from rank 0 and its exit code.

    Any other exception keeps its traceback: it is a defect, not a mistake of the user.
    """
    try:
        main(sys.argv[1:])
    except PromoeError as error:
        if rank_from_environment() == 0:
            sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # No interpreter shutdown: ranks that wait in a collective of another library would keep this one alive.
        os._exit(error.exit_code)
