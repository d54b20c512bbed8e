"""Trace in a process of its own: python -m benchmarks.fake_cuda LIBRARY REQUESTS.json OUT.json."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from benchmarks.fake_cuda.device import load_guard, stand_in


def main(library: str, requests: str, out: str) -> None:
    """Write one answer a request: what was traced, or `error` and `traceback`."""
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

    answers = []
    for values in json.loads(Path(requests).read_text(encoding="utf-8")):
        recorder.reset()
        try:
            answers.append(trace_step(Request(**values), recorder))
        except (PromoeError, ImportError) as error:
            answers.append({"refused": str(error)})
        except Exception:
            answers.append({"failed": traceback.format_exc()})
    Path(out).write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    # The engine's threads for this device would abort the interpreter's end.
    os._exit(0)


main(*sys.argv[1:])
