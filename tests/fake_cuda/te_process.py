"""Traces under the real Python of Transformer Engine: `python -m tests.fake_cuda.te_process WHEEL
LIBRARY REQUESTS.json OUT.json`, called by `benchmarks.trace.trace`.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.fake_cuda.__main__ import main

#: Compute capability of a device, and the CUDA beside it.
DEVICES = {"a100": (8, 0, "12.9"), "l40": (8, 9, "12.9"), "h100": (9, 0, "12.9")}
DEVICES |= {"h100, CUDA 12.6": (9, 0, "12.6"), "b200": (10, 0, "12.9"), "rtx5090": (12, 0, "12.9")}


def prepare(recorder: Any, wheel: str) -> Callable[[], dict[str, Any]]:
    """Install the library; return what tells its products since the last step, and its answers
    about devices.
    """
    from tests.fake_cuda.te_stub import install

    compiled = install(Path(wheel), recorder)
    constant = {
        "choices": {name: _in_a_fork(_choices, *device) for name, device in DEVICES.items()},
        "other_state": _other_state(),
    }

    def more() -> dict[str, Any]:
        products = dict(compiled.products)
        compiled.products.clear()
        compiled.forget()
        return {"products": products, **constant}

    return more


def _in_a_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments): the library answers once a process and keeps the answer."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _choices(major: int, minor: int, cuda: str) -> dict[str, str]:
    """Return the recipe that every `precision.fp8_recipe` gets on a device, or the refusal."""
    import torch

    from promoe_ds.backends.te_support import resolved_recipe
    from promoe_ds.config import load_config
    from promoe_ds.errors import ConfigError

    properties = torch.cuda.get_device_properties()
    properties.major, properties.minor, torch.version.cuda = major, minor, cuda
    torch.cuda.get_device_capability = lambda *unused: (major, minor)
    found = {}
    for requested in ("auto", "delayed", "current", "block", "mxfp8"):
        precision = ["precision.compute=fp8", f"precision.fp8_recipe={requested}"]
        try:
            found[requested] = resolved_recipe(load_config("promoe_s", precision))
        except ConfigError as error:
            found[requested] = f"refused: {error}"
    return found


def _other_state() -> list[str]:
    """Return the names that only one of two states has: of a network in FP8, and of torch's."""
    import torch

    from promoe_ds.backends.te_layers import use_transformer_engine
    from promoe_ds.config import load_config
    from promoe_ds.model import build_model

    config = load_config("promoe_s", ["precision.compute=fp8", "model.qk_norm=true"])
    with torch.device("meta"):
        plain, changed = build_model(config), build_model(config)
    use_transformer_engine(changed, config, torch.device("cuda"))
    return sorted(plain.state_dict().keys() ^ changed.state_dict().keys())


if __name__ == "__main__":
    wheel, *files = sys.argv[1:]
    main(*files, prepare=partial(prepare, wheel=wheel))
