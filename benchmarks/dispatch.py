"""The exchange of a MoE layer over real ranks: bytes sent, and time by candidate."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.candidates import (
    LIBRARIES,
    build_each,
    initialised,
    layer_of,
    mixture_recipe,
    with_dispatch,
)
from benchmarks.layers import conditional, layer_call, pass_of
from benchmarks.processes import on_ranks
from benchmarks.timing import Result, compare
from promoe_ds.config import RunConfig
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import MoELayer
from promoe_ds.moe.dispatch import ALL_TO_ALLS_PER_STEP
from promoe_ds.planning.trace import CollectiveWatch
from promoe_ds.routing.assignment import Assignment


def benchmark_dispatch(
    *, tokens: int, rounds: int, recipe: str = "promoe_s", ranks: int = 2
) -> Result:
    """Time one MoE layer whose experts are on `ranks` processes, and count what is sent.

    Candidates: `exchange_limit`, the bare exchange of the same rows and nothing else; `deepspeed`,
    the dropless exact-size exchange; the libraries' layers where this installation has them.
    settings.bytes_sent holds, by candidate, what all ranks sent to one another, and `ideal`: rows
    whose expert is elsewhere, four times.
    Args:
        tokens: of one rank, whole images.
    Raises: ConfigError for more ranks than devices, unless DS_ACCELERATOR=cpu asks for CPUs.
    """
    _check_ranks(ranks)
    config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    return on_ranks(ranks, run_rank, config, images, rounds)[0]


def _check_ranks(ranks: int) -> None:
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1")
    on_cuda = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    devices = torch.cuda.device_count() if on_cuda else 0
    if 0 < devices < ranks:
        raise ConfigError(
            f"--ranks {ranks}: every rank takes a CUDA device of its own, this machine "
            f"has {devices}: use at most {devices}, or set DS_ACCELERATOR=cpu to time "
            "the exchange between CPU processes"
        )


def run_rank(ranks: DistributedContext, config: RunConfig, images: int, rounds: int) -> Result:
    """Be one rank; the ranks' results differ only in their own times."""
    device, model = ranks.device, config.model
    torch.manual_seed(0)  # the same prototypes everywhere
    router = initialised(build_moe_layer(config)).router.state_dict()
    layers, missing = build_each(
        ("alltoall", *LIBRARIES),
        lambda name: layer_of(with_dispatch(config, name), device, torch.float32),
    )
    for layer in layers.values():
        layer.router.load_state_dict(router)
    torch.manual_seed(1 + ranks.rank)
    inputs = torch.randn(images, model.tokens_per_image, model.hidden_size, device=device)
    direction, partition = torch.randn_like(inputs), conditional(images, config, device)
    with torch.no_grad():
        assignment = layers["alltoall"].route(inputs, partition).assignment
    passes = {"exchange_limit": _bare_exchange(layers["alltoall"], assignment, inputs)}
    for name, layer in layers.items():
        call = layer_call(layer, partition)
        passes[name] = partial(pass_of, layer, call, inputs, direction)
    leaving = _of_all_ranks(layers["alltoall"].dispatcher.rows_leaving(assignment))
    sent = {"ideal": ALL_TO_ALLS_PER_STEP * leaving * model.hidden_size * inputs.element_size()}
    for name, call in passes.items():
        with CollectiveWatch() as watch:
            call()
        sent[name] = _of_all_ranks(torch.tensor(watch.rows_sent(ranks.rank), device=device))
    together = {name: lambda call=call: (dist.barrier(), call()) for name, call in passes.items()}
    settings = {
        "recipe": config.name,
        "ranks": ranks.world_size,
        "images_per_rank": images,
        "bytes_sent": sent,
    }
    return compare("dispatch", together, rounds=rounds, settings=settings, missing=missing)


def _of_all_ranks(count: torch.Tensor) -> int:
    dist.all_reduce(count)
    return int(count)


def _bare_exchange(
    layer: MoELayer, assignment: Assignment, inputs: torch.Tensor
) -> Callable[[], None]:
    """Return the exchange of an assignment's rows, four times, with sizes known beforehand."""
    group = layer.dispatcher.group
    sent = assignment.tokens_per_expert_E.view(layer.dispatcher.world_size, -1).sum(dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    out, back = sent.tolist(), received.tolist()
    rows = inputs.flatten(0, 1).index_select(0, assignment.token_ids_N)
    arrived = rows.new_empty(sum(back), rows.shape[1])

    def run() -> None:
        for _ in range(ALL_TO_ALLS_PER_STEP // 2):
            dist.all_to_all_single(arrived, rows, back, out, group=group)
            dist.all_to_all_single(rows, arrived, out, back, group=group)

    return run
