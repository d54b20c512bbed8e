"""Trace in a process of its own: python -m benchmarks.fake_cuda LIBRARY REQUESTS.json OUT.json."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fake_cuda.device import load_guard, stand_in

if TYPE_CHECKING:
    from benchmarks.fake_cuda.recorder import Recorder


def main(
    library: str,
    requests: str,
    out: str,
    prepare: Callable[[Recorder], Callable[[], dict[str, Any]]] = lambda recorder: dict,
) -> None:
    """Write one answer a request: what was traced, or `refused`, or `failed` and the traceback.

    prepare: called once the device stands in; what it returns adds to every answer.
    """
    load_guard(Path(library))
    import torch

    from benchmarks.fake_cuda.recorder import Recorder
    from promoe_ds.errors import PromoeError

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    recorder = Recorder()
    stand_in(recorder)
    os.environ["DS_ACCELERATOR"] = "cuda"
    from benchmarks.fake_cuda.step import Request, trace_step

    more = prepare(recorder)
    answers = []
    for values in json.loads(Path(requests).read_text(encoding="utf-8")):
        recorder.reset()
        try:
            answers.append(trace_step(Request(**values), recorder) | more())
        except (PromoeError, ImportError) as error:
            answers.append({"refused": str(error)})
        except Exception:
            answers.append({"failed": traceback.format_exc()})
    Path(out).write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    # The engine's threads for this device would abort the interpreter's end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
