"""A dense model becomes a mixture of experts: the dense feed-forwards split, routers started at
real tokens.

How the feed-forward is split is `model/upcycle.py`'s. Here the dense model sees a batch of
images; at every block that gets experts, its tokens start the prototypes (k-means) and give the
mean gate that a conditional token will get, against which the routed experts' outputs are scaled.
So the layer's output is the dense one exactly for null samples, and on average for the others, as
far as the widths allow.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from promoe_ds.checkpoint.conversion.convert import (
    Conversion,
    Request,
    convert_source,
    find_weights,
    open_source,
    refuse_existing,
    with_latents_of,
)
from promoe_ds.checkpoint.conversion.sources import Source, SourceInfo
from promoe_ds.checkpoint.zero_files import WEIGHTS
from promoe_ds.config.schema import RunConfig
from promoe_ds.data import build_dataset, largest_bucket, sample_indices
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.diffusion import DiffusionBatch, build_objective, draw_batch
from promoe_ds.errors import CheckpointError, ConfigError, differences
from promoe_ds.model.build import build_model
from promoe_ds.model.dit import DiT
from promoe_ds.model.export import fill_network
from promoe_ds.model.init import fill_parameter
from promoe_ds.model.state import POSITIONS, state_shapes
from promoe_ds.model.upcycle import DENSE_PARAMETERS, UnitSplit, split_units, upcycled_parameter
from promoe_ds.randomness import generator
from promoe_ds.routing import ClassificationRouter, KMeansRouter, Router, build_router
from promoe_ds.routing.clustering import cluster_tokens
from promoe_ds.routing.partition import Partition, partition_samples

#: Below this mean gate, outputs are not scaled against it: prototypes that are nowhere near the
#: tokens say nothing.
_SMALLEST_GATE = 0.05


@dataclass(frozen=True, kw_only=True)
class UpcycleRequest:
    """What to make of a dense checkpoint.

    to: "deepspeed" (a start for training) or "single"; weights: "ema" or "raw", the source's
        default if None.
    prototypes: "kmeans" of the tokens of `images` training images, or "random" (the recipe's
        initial ones, unscaled outputs).
    noise: added to routed experts' incoming weights, relative to their spread.
    """

    destination: Path
    to: str = "deepspeed"
    weights: str | None = None
    prototypes: str = "kmeans"
    images: int = 64
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _RouterStart:
    """One layer's router: its tensors by leaf name, and what its experts' outputs are multiplied
    by.
    """

    state: dict[str, Tensor]
    gate_scale: float = 1.0


def upcycle(
    source_path: Path,
    config: RunConfig,
    request: UpcycleRequest,
    source_config: RunConfig | None = None,
) -> tuple[Conversion, dict[str, float]]:
    """Write a MoE checkpoint from a dense one.

    Args:
        source_path, source_config: as for `open_source`; config: the MoE recipe.
    Returns: what was written, and how near the new model's predictions are to the dense one's: root
        mean square differences, relative to the dense output, of the batch's "null samples" and
        "conditional samples", where it has such (nothing with prototypes="random").
    Raises: CheckpointError, ConfigError or DataError naming what does not fit.
    """
    refuse_existing(request.destination)
    source = open_source(source_path, source_config, flag="--source-recipe")
    _check_fit(source.info, config)
    kind = find_weights(source, request.weights)
    start = Request(destination=request.destination, to=request.to, weights="raw")
    if request.prototypes == "random":
        starts = {index: _random_start(config, index) for index in config.moe_block_indices}
        return convert_source(
            _UpcycledSource(source, kind, config, starts, request.noise), start
        ), {}
    dense, batch = load_network(source, kind), _training_batch(config, request.images)
    source = open_source(source_path, source_config)  # a source is read once
    starts = _start_routers(config, dense, batch)
    report = convert_source(_UpcycledSource(source, kind, config, starts, request.noise), start)
    upcycled = load_network(open_source(request.destination), WEIGHTS)
    return report, _compare(dense, upcycled, batch)


def load_network(source: Source, kind: str) -> DiT:
    """Build the network of a source, whole, in evaluation mode."""
    with torch.device("meta"):
        network = build_model(source.info.config)
    return fill_network(
        network, {name: source.read(kind, name).float() for name in source.kinds[kind]}
    )


class _UpcycledSource:
    """A dense source seen through a MoE recipe."""

    optimizer_step: int | None = None

    def __init__(
        self,
        dense: Source,
        kind: str,
        config: RunConfig,
        starts: dict[int, _RouterStart],
        noise: float,
    ) -> None:
        self._dense, self._kind, self._starts, self._noise = dense, kind, starts, noise
        self._split = split_units(config)
        self.shapes = state_shapes(config, own_positions=POSITIONS in dense.kinds[kind])
        self.kinds = {WEIGHTS: list(self.shapes)}
        origin = {
            **dense.info.origin,
            "upcycled_from": str(dense.info.path),
            "source_kind": kind,
            "gate_scales": {str(index): start.gate_scale for index, start in starts.items()},
        }
        saved = dense.info.config
        states = not LatentNormalization.of(saved.data).is_identity
        self.info = replace(
            dense.info,
            config=with_latents_of(config, saved) if states else config,
            origin=origin,
            averages_since={},
            note=_describe(config, self._split, starts.values(), noise),
        )
        self._feed_forward = lru_cache(1)(self._read_feed_forward)

    def read(self, kind: str, name: str) -> Tensor:
        if ".moe." not in name:
            return self._dense.read(self._kind, name).float()
        block = int(name.split(".")[1])
        if ".moe.router." in name:
            return self._starts[block].state[name.split(".moe.router.")[1]]
        return upcycled_parameter(
            name,
            self.shapes[name],
            self._feed_forward(block),
            self._split,
            self.info.config,
            noise=self._noise,
            gate_scale=self._starts[block].gate_scale,
        )

    def check(self, kind: str) -> int:
        return self._dense.check(self._kind)

    def _read_feed_forward(self, block: int) -> dict[str, Tensor]:
        return {
            ours: self._dense.read(self._kind, f"blocks.{block}.feed_forward.{theirs}").float()
            for ours, theirs in DENSE_PARAMETERS[self.info.config.model.mlp_type].items()
        }


def _check_fit(info: SourceInfo, config: RunConfig) -> None:
    if info.config.routing.method != "dense":
        raise CheckpointError(
            f"{info.path}: is no dense model (routing.method={info.config.routing.method}): only a"
            " dense feed-forward can be split over experts"
        )
    if config.routing.method == "dense":
        raise ConfigError(
            f"--recipe {config.name}: routing.method=dense has no experts: name a recipe that has"
        )
    there, here = (
        {
            **{f"model.{name}": value for name, value in each.model if name != "preset"},
            "diffusion.objective": each.diffusion.objective,
        }
        for each in (info.config, config)
    )
    if wrong := differences(there, here):
        raise CheckpointError(f"{info.path}: does not fit {config.name}: {'; '.join(wrong)}")


def _training_batch(config: RunConfig, images: int) -> DiffusionBatch:
    """Take the recipe's first training images, noised and with labels dropped as in training."""
    dataset, seed = largest_bucket(build_dataset(config)), config.train.seed
    clean, condition = dataset.take(sample_indices(len(dataset), seed=seed, start=0, count=images))
    return draw_batch(
        clean, condition, build_objective(config.diffusion), seed=seed, step=0, slots=range(images)
    )


def _start_routers(config: RunConfig, dense: DiT, batch: DiffusionBatch) -> dict[int, _RouterStart]:
    """Make every layer's router, at the tokens that the dense model has there."""
    partition = partition_samples(
        batch.condition, has_unconditional_expert=config.routing.num_unconditional_experts > 0
    )
    starts: dict[int, _RouterStart] = {}

    def start(index: int, module: nn.Module, arguments: tuple[Tensor]) -> None:
        starts[index] = _start_router(config, index, arguments[0], partition)

    with ExitStack() as hooks:
        for index in config.moe_block_indices:
            layer = dense.blocks[index].feed_forward
            hooks.callback(layer.register_forward_pre_hook(partial(start, index)).remove)
        _predict(dense, batch)
    return starts


def _start_router(
    config: RunConfig, index: int, tokens_BSD: Tensor, partition: Partition
) -> _RouterStart:
    router, count = _initial_router(config, index), config.routing.num_experts
    directions = "centroids" if isinstance(router, KMeansRouter) else "prototypes"
    pool_TD, state = partition.take_routed(tokens_BSD).flatten(0, 1), router.state_dict()
    if directions in state:
        if len(pool_TD) < count:
            raise ConfigError(
                f"--images: the batch has {len(pool_TD)} conditional tokens for"
                f" routing.num_experts={count}: take more images"
            )
        numbers = generator(config.train.seed, "init", zlib.crc32(b"upcycle"), index)
        is_spherical = directions == "prototypes"
        centroids_ED = cluster_tokens(
            pool_TD, torch.from_numpy(numbers.random(count)), spherical=is_spherical
        )
        if is_spherical:  # the length that prototypes have at first: it sets how fast they turn
            centroids_ED *= state[directions].norm(dim=-1).mean()
        state[directions].copy_(centroids_ED)  # the router's own: state_dict shares memory
    with torch.no_grad():
        plan = router.train()(tokens_BSD, partition)
    mean_gate = (plan.assignment.gates_N.sum() / max(1, len(pool_TD))).item()
    return _RouterStart(
        state=state, gate_scale=1 / mean_gate if mean_gate > _SMALLEST_GATE else 1.0
    )


def _random_start(config: RunConfig, index: int) -> _RouterStart:
    if config.routing.method == "kmeans":
        raise ConfigError(
            "--prototypes random: routing.method=kmeans has no random start: use --prototypes"
            " kmeans"
        )
    return _RouterStart(state=_initial_router(config, index).state_dict())


def _initial_router(config: RunConfig, index: int) -> Router:
    router = build_router(config, index)
    router.reset_state()
    for name, parameter in router.named_parameters():
        full_name = f"blocks.{index}.moe.router.{name}"
        fill_parameter(parameter, full_name, config.train.seed, config.routing)
    if isinstance(router, ClassificationRouter) and config.routing.superclasses is not None:
        router.set_superclasses(config.routing.superclasses)
    return router


def _describe(
    config: RunConfig, split: UnitSplit, starts: Iterable[_RouterStart], noise: float
) -> str:
    """Say what is preserved."""
    null = "exactly" if split.unconditional_is_exact else "in part only"
    if not config.routing.num_unconditional_experts:
        null = "routed like the others"
    keeps_gates = split.routed_is_exact and config.routing.traits.unit_gates and not noise
    if split.rest_units == 0 or keeps_gates:
        routed = "exactly"
    elif noise:
        routed = f"in part only: --noise {noise:g} was added"
    elif split.routed_is_exact and any(start.gate_scale != 1 for start in starts):
        routed = "on average over the gates"
    elif split.routed_is_exact:
        routed = "in part only: gates differ from 1"
    elif split.routed:
        held = f"{config.expert_width} of {split.rest_units} hidden units"
        routed = f"in part only: an expert holds {held}"
    else:
        routed = "in part only: experts of another type than the dense ones start silent"
    return (
        f"{split.shared_units} hidden units to the shared experts, {split.rest_units} to each of"
        f" the others; the dense function is kept for null samples: {null}; for conditional tokens:"
        f" {routed}"
    )


@torch.no_grad()
def _predict(network: DiT, batch: DiffusionBatch) -> Tensor:
    objective = build_objective(network.config.diffusion)
    return network(objective.noised(batch), objective.timestep(batch), batch.condition)


def _compare(dense: DiT, upcycled: DiT, batch: DiffusionBatch) -> dict[str, float]:
    expected, found = _predict(dense, batch), _predict(upcycled, batch)
    is_null = batch.condition.is_null_B
    least = torch.finfo(expected.dtype).tiny
    return {
        name: ((found - expected)[chosen].norm() / expected[chosen].norm().clamp_min(least)).item()
        for name, chosen in (("null samples", is_null), ("conditional samples", ~is_null))
        if chosen.any()
    }
