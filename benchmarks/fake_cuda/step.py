"""One optimizer step of the trainer, through DeepSpeed's engine, on a device that is not there."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.fake_cuda.account import summary
from benchmarks.fake_cuda.recorder import Recorder
from promoe_ds.backends.deepspeed_private import forget_expert_groups
from promoe_ds.backends.process_group import start_distributed
from promoe_ds.config import (
    BatchPlan,
    DeepSpeedPlan,
    RunConfig,
    change_config,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.data import build_dataset
from promoe_ds.errors import ConfigError
from promoe_ds.planning.shapes import fake_world
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.training.trainer import Trainer

_TIMEOUT_SECONDS = 600.0
#: Steps before the one that is noted: the first one makes the optimizer's state.
_WARMUP = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to trace: a recipe with overrides, on rank 0 of `world_size`, under a DeepSpeed JSON;
    with `depth` blocks where that is not None.
    """

    recipe: str
    overrides: list[str]
    world_size: int
    deepspeed: str
    depth: int | None = None

    def resolve(self) -> tuple[RunConfig, BatchPlan, DeepSpeedPlan]:
        """Return what a run of it would train: fake samples are as good as others, and a handful
        enough for any batch.
        """
        data = ["data.dataset=synthetic", "data.synthetic_samples=64"]
        config = load_config(self.recipe, [*self.overrides, *data])
        if self.depth is not None:
            config = change_config(config, model={"preset": None, "depth": self.depth})
        batches = plan_batches(config, self.world_size)
        values = read_deepspeed_json(self.deepspeed)
        return config, batches, resolve_deepspeed(values, config, batches, source=self.deepspeed)


def trace_step(request: Request, recorder: Recorder) -> dict[str, Any]:
    """Build the trainer and trace its second step, on the samples and the dropout of its batch.

    Raises: ConfigError for what is not installed or cannot be traced; whatever fails on fake
    tensors, for instance tensors on different devices.
    """
    config, batches, plan = request.resolve()
    if config.parallel.compile:
        raise ConfigError("parallel.compile=true: only the eager step can be traced: set it false")
    with _fake_ranks(request.world_size) as context, FakeTensorMode(allow_non_fake_inputs=True):
        with recorder, _without_values(recorder):
            trainer = Trainer(config, plan, context, build_dataset(config))
            try:
                gradients = _watch_gradients(trainer, recorder)
                for _ in range(_WARMUP):
                    trainer.train_step()
                gc.collect()  # earlier engines, whose end waits for the device
                recorder.events.clear()
                gradients.clear()
                recorder.is_on = True
                trainer.train_step()
            finally:
                recorder.is_on = False
                trainer.loader.close()
        moe_layers = len(trainer.network.moe_layers())
        parameters = {n: p for n, p in trainer.module.named_parameters() if p.requires_grad}
        trainer.engine.destroy()
    return {
        "recipe": config.name,
        "overrides": request.overrides,
        "world_size": request.world_size,
        "images": batches.micro_batch * batches.accumulation,
        "parameters": sum(p.numel() for p in parameters.values()),
        "moe_layers": moe_layers,
        "without_gradient": sorted(parameters.keys() - gradients),
        **summary(recorder),
    }


@contextmanager
def _fake_ranks(world_size: int) -> Iterator[Any]:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    module = "promoe_ds.backends.process_group"
    with (
        patch.dict(os.environ, {**place, "DS_ACCELERATOR": "cuda"}),
        patch(f"{module}.join_process_group"),
        fake_world(world_size),
    ):
        try:
            yield start_distributed(_TIMEOUT_SECONDS)
        finally:
            forget_expert_groups()


@contextmanager
def _without_values(recorder: Recorder) -> Iterator[None]:
    """Leave out what needs values: initial weights, the hosts' names of ranks that are not there;
    answer reads of whole tensors.
    """
    trainer, plain = "promoe_ds.training.trainer", FakeTensor.tolist

    def read(tensor: FakeTensor) -> Any:
        if sys._getframe(1).f_locals.get("sorted_idxs") is tensor:  # Megatron-core's, no counts
            return list(range(len(tensor)))
        return recorder.read_list(tensor) if tensor.dim() else plain(tensor)

    with ExitStack() as stack:
        stack.enter_context(
            patch(f"{trainer}.initialise", lambda network, seed: network.reset_positions())
        )
        stack.enter_context(patch(f"{trainer}.check_placement"))
        stack.enter_context(patch.object(FakeTensor, "tolist", read))
        stack.enter_context(
            patch.object(FakeTensor, "numpy", lambda tensor: np.array(read(tensor)), create=True)
        )
        yield


def _watch_gradients(trainer: Trainer, recorder: Recorder) -> set[str]:
    """Return a set to which every gradient's parameter is added; tell the recorder the rows."""
    seen: set[str] = set()

    def see(name: str, parameter: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def check(gradient: torch.Tensor) -> None:
            if (gradient.dtype, gradient.device) == (parameter.dtype, parameter.device):
                seen.add(name)

        return check

    for name, parameter in trainer.module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(see(name, parameter))

    def expect_rows(router: object, inputs: object, plan: RoutingPlan) -> None:
        counts_E = plan.assignment.tokens_per_expert_E
        recorder.rows = plan.assignment.token_ids_N.numel()
        recorder.expert_rows = -(-recorder.rows // counts_E.numel())

    for layer in trainer.network.moe_layers().values():
        layer.router.register_forward_hook(expect_rows)
    return seen
