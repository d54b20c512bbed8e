"""The exchange of a MoE layer over real ranks: bytes sent against the least possible, and time by contender."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from promoe_ds.analysis.benchmarks.contenders import library_layers
from promoe_ds.analysis.benchmarks.layers import initialised, layer_pass, mixture_recipe
from promoe_ds.analysis.benchmarks.timing import BenchmarkResult, Timing, interleave
from promoe_ds.analysis.plan.trace import CollectiveWatch
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.errors import ConfigError, TrainingError
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import AllToAllDispatcher, MoELayer, StackedExperts
from promoe_ds.routing import partition_samples

#: A row travels out and back in the forward pass, and again in the backward pass.
_ALL_TO_ALLS_PER_STEP = 4
_TIMEOUT_SECONDS = 540


def benchmark_dispatch(*, tokens: int, rounds: int, recipe: str = "promoe_s", ranks: int = 2) -> BenchmarkResult:
    """Time one MoE layer whose experts lie over `ranks` processes, forward and backward, and count what is sent.

    Contenders: `exchange_limit`, the bare exchange of the same rows and nothing else; `deepspeed`, the dropless exact-size
    exchange; the libraries' layers where this installation has them. settings.bytes_sent holds, by contender, what all ranks
    sent to one another, and `ideal`: rows whose expert lives elsewhere, four times.
    Args:
        tokens: of one rank, whole images.
    Raises: ConfigError for more ranks than devices, where there are any and DS_ACCELERATOR=cpu does not ask for CPUs.
    """
    _check_ranks(ranks)
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    values = config.model_dump(mode="json")
    values["parallel"] |= {"ep_size": ranks, "dispatch": "alltoall"}
    config = config_from_dict(values, source=recipe)
    with tempfile.TemporaryDirectory() as folder:
        job, target = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"config": values, "rounds": rounds,
                                   "images": max(1, tokens // config.model.tokens_per_image)}), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
                   "promoe_ds.analysis.benchmarks.dispatch", str(job), str(target)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                              timeout=_TIMEOUT_SECONDS, check=False)
        if done.returncode:
            raise TrainingError(f"timing the exchange on {ranks} processes failed:\n{done.stderr[-2000:]}")
        result = json.loads(target.read_text(encoding="utf-8"))
    timings = {name: Timing(**timing) for name, timing in result.pop("timings").items()}
    return BenchmarkResult(suite="dispatch", timings=timings, **result)


def _check_ranks(ranks: int) -> None:
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: must be at least 1")
    devices = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if 0 < devices < ranks:
        raise ConfigError(f"--ranks {ranks}: every rank takes a CUDA device of its own and this machine shows {devices}: use at "
                          f"most {devices}, or set DS_ACCELERATOR=cpu to time the exchange between CPU processes")


def exchange_layer(config: RunConfig, group: dist.ProcessGroup) -> MoELayer:
    """Build a layer that holds this rank's share of the experts and exchanges rows over `group`."""
    layer = initialised(build_moe_layer(config))
    layer.routed = initialised(StackedExperts(config.routing.num_experts // dist.get_world_size(group), config.model.hidden_size,
                                              config.expert_width, expert_type=config.routing.expert_type,
                                              backend=config.expert_backend))
    layer.dispatcher = AllToAllDispatcher(group)
    return layer


def run_rank(config: RunConfig, images: int, rounds: int, device: torch.device) -> BenchmarkResult:
    """Be one rank of the contest; all ranks return alike but for their own times."""
    world, group = dist.get_world_size(), dist.group.WORLD
    torch.manual_seed(0)  # the same prototypes everywhere
    layer = exchange_layer(config, group).to(device)
    libraries, missing = library_layers(config, device, torch.float32)
    torch.manual_seed(1 + dist.get_rank())
    inputs = torch.randn(images, config.model.tokens_per_image, config.model.hidden_size, device=device)
    direction = torch.randn_like(inputs)
    partition = partition_samples(torch.zeros(images, dtype=torch.int64, device=device), config.model.null_label)
    with torch.no_grad():
        assignment = layer.route(inputs, partition).assignment
    passes: dict[str, Callable[[], None]] = {"exchange_limit": _bare_exchange(layer, assignment, inputs)}
    for name, contender in ({"alltoall": layer} | libraries).items():
        if name in libraries:
            contender.router.load_state_dict(layer.router.state_dict())
        passes[name] = lambda contender=contender: layer_pass(contender, inputs, direction, partition)
    sent = {name: _bytes_sent(call, device) for name, call in passes.items()}
    leaving = layer.dispatcher.rows_leaving(assignment)
    dist.all_reduce(leaving)
    ideal = _ALL_TO_ALLS_PER_STEP * int(leaving) * config.model.hidden_size * inputs.element_size()
    timings = interleave({name: _together(call) for name, call in passes.items()}, rounds=rounds)
    return BenchmarkResult(suite="dispatch", baseline="exchange_limit", rounds=rounds, timings=timings, not_available=missing,
                           settings={"recipe": config.name, "ranks": world, "images_per_rank": images,
                                     "bytes_sent": {"ideal": ideal, **sent}})


def _bare_exchange(layer: MoELayer, assignment: object, inputs: torch.Tensor) -> Callable[[], None]:
    """Return the exchange of an assignment's rows, four times, with sizes known beforehand."""
    dispatcher = layer.dispatcher
    world = dispatcher.world_size
    sent = assignment.tokens_per_expert_E.view(world, -1).sum(dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=dispatcher.group)
    out, back = sent.tolist(), received.tolist()
    rows = inputs.flatten(0, 1).index_select(0, assignment.token_ids_N)
    arrived = rows.new_empty(sum(back), rows.shape[1])

    def run() -> None:
        for _ in range(_ALL_TO_ALLS_PER_STEP // 2):
            dist.all_to_all_single(arrived, rows, back, out, group=dispatcher.group)
            dist.all_to_all_single(rows, arrived, out, back, group=dispatcher.group)

    return run


def _bytes_sent(call: Callable[[], None], device: torch.device) -> int:
    """Return what one pass makes all ranks send each other by all-to-all of rows."""
    with CollectiveWatch() as watch:
        call()
    rank = dist.get_rank()
    own = sum(size for one in watch.sent if one.name == "alltoall_base_" and one.floating
              for member, size in zip(one.members, one.bytes_by_member, strict=True) if member != rank)
    total = torch.tensor(own, device=device)
    dist.all_reduce(total)
    return int(total)


def _together(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        dist.barrier()
        call()

    return run


def _main() -> None:
    from promoe_ds.backends.process_group import start_distributed
    from promoe_ds.distributed.process_group import complete_environment, stop_distributed

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    complete_environment()
    ranks = start_distributed(timeout_seconds=300)
    config = config_from_dict(job["config"], source="benchmark")
    result = run_rank(config, job["images"], job["rounds"], ranks.device)
    if ranks.is_main:
        values = asdict(result)
        values.pop("suite")
        Path(sys.argv[2]).write_text(json.dumps(values), encoding="utf-8")
    stop_distributed()


if __name__ == "__main__":
    _main()
