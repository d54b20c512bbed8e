"""What is traced, and the kernels and bytes that each case may take at most (`counts.json`).

Counts may only fall: `python -m tests.fake_cuda.cases` traces every case anew and writes those that
fell, and refuses to raise one; `--raise` writes all, for a change that is worth its kernels.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.fake_cuda.device import build_guard
from benchmarks.trace import trace
from promoe_ds.config import list_recipes, load_config

COUNTS = Path(__file__).with_name("counts.json")
LIBRARIES = ("torch", "deepspeed")
_DEPTH, _IMAGES = 2, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe and how it is laid out; with `depth` blocks, on rank 0 of `world_size`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    world_size: int = 1
    passes: int = 1
    #: Beside what every step reads: by place, for each MoE layer and pass.
    layer_reads: dict[str, int] = field(default_factory=dict)
    #: Tensors of a batch.
    copies: int = 4

    def request(self) -> dict[str, Any]:
        """Return it as `benchmarks.trace.trace` takes it."""
        batch = [f"train.global_batch_size={_IMAGES * self.world_size * self.passes}"]
        batch += [f"train.micro_batch_size={_IMAGES}"]
        return {
            "recipe": self.recipe,
            "overrides": [*self.overrides, *batch],
            "world_size": self.world_size,
            "depth": _DEPTH,
        }


#: For a recipe that leaves its map to the user.
_SMALL_MAP = ("routing.superclass_map=digits", "routing.num_experts=4", "model.num_classes=10")
_EXCHANGE = "read of promoe_ds/moe/dispatch.py:AllToAllDispatcher._exchange_counts"
_STOCK = (
    "read of deepspeed/moe/sharded_moe.py:MOELayer.forward"
    " < promoe_ds/backends/stock_deepspeed.py:DeepSpeedMoEPath.begin"
)


def _exchanged(recipe: str, *overrides: str) -> Case:
    return Case(
        recipe=recipe,
        overrides=("parallel.ep_size=4", *overrides),
        world_size=8,
        layer_reads={_EXCHANGE: 1},
    )


def _packaged(recipe: str) -> Case:
    """Return a packaged recipe as it is, on as many ranks as its experts need."""
    overrides = _SMALL_MAP if recipe == "classification_b" else ()
    config = load_config(recipe, overrides)
    ep_size = config.parallel.ep_size
    return Case(
        recipe=recipe,
        overrides=overrides,
        world_size=ep_size,
        layer_reads={_EXCHANGE: 1} if ep_size > 1 else {},
        # Of texts also the empty one, and the groups of captions where there are any.
        copies=9 + (config.num_groups > 0) if config.model.condition == "text" else 4,
    )


#: One recipe of every method, one of text and one of another block.
METHODS = ("promoe_s", "promoe_ec_s", "ditmoe_s", "ecdit_s", "diffmoe_s", "expertrace_s")
METHODS += ("kmeans_b", "dit_s", "digits_classification", "promoe_s_ddpm", "promoe_t2i_b")
METHODS += ("promoe_b_modern",)
LAYOUTS = {
    "promoe_b, 8 ranks": Case(recipe="promoe_b", world_size=8),
    "promoe_b, 8 ranks, ep 4": _exchanged("promoe_b"),
    "promoe_b, 8 ranks, ep 4, full": _exchanged(
        "promoe_b", "parallel.activation_checkpointing=full"
    ),
    "promoe_b, 8 ranks, ep 4, selective": _exchanged(
        "promoe_b", "parallel.activation_checkpointing=selective"
    ),
    "promoe_b, 8 ranks, ep 4, fp8 rows": _exchanged("promoe_b", "parallel.comm_dtype=fp8"),
    "promoe_b, two passes": Case(recipe="promoe_b", passes=2),
    "promoe_b, swiglu, two experts a token": Case(
        recipe="promoe_b", overrides=("routing.expert_type=swiglu", "routing.top_k=2")
    ),
    "promoe_b, loop": Case(
        recipe="promoe_b",
        overrides=("parallel.expert_backend=loop",),
        layer_reads={"read of promoe_ds/moe/products.py:Loop.__init__": 1},
    ),
    "promoe_b, deepspeed_moe, 2 ranks": Case(
        recipe="promoe_b",
        overrides=("parallel.dispatch=deepspeed_moe", "parallel.ep_size=2"),
        world_size=2,
        layer_reads={_STOCK: 1},
    ),
}
#: What the library reads is its own affair: its places are not listed.
MEGATRON = {
    f"promoe_b, megatron {kind}, 2 ranks": Case(
        recipe="promoe_b",
        overrides=(
            "parallel.dispatch=megatron",
            "parallel.ep_size=2",
            f"parallel.megatron_dispatcher={kind}",
        ),
        world_size=2,
    )
    for kind in ("alltoall", "allgather")
}
RECIPES = {name: _packaged(name) for name in list_recipes()}
CASES = RECIPES | LAYOUTS | MEGATRON


def installed() -> dict[str, str]:
    """Return the versions that counts hold for; without the build behind a plus."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {name: version.partition("+")[0] for name, version in versions.items()}


def main(may_rise: bool) -> None:
    """Trace every case and write its counts."""
    with tempfile.TemporaryDirectory() as folder:
        requests = [case.request() for case in CASES.values()]
        found = trace(requests, build_guard(Path(folder)), Path(folder))
    known = json.loads(COUNTS.read_text(encoding="utf-8"))["cases"] if COUNTS.is_file() else {}
    counts = {}
    for name, one in zip(CASES, found, strict=True):
        if "totals" not in one:
            sys.exit(f"{name}: {one}")
        counts[name] = {key: one["totals"][key] for key in ("kernels", "bytes")}
        risen = [key for key, value in known.get(name, {}).items() if counts[name][key] > value]
        if risen and not may_rise:
            sys.exit(f"{name}: more {' and '.join(risen)}: {counts[name]} after {known[name]}")
    text = json.dumps({"versions": installed(), "cases": counts}, indent=1)
    COUNTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--raise" in sys.argv)
