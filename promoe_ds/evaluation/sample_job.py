"""Drawing labelled samples from an export, on one process or many; a job that was stopped goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from promoe_ds.checkpoint.manifest import checksum
from promoe_ds.config import RunConfig
from promoe_ds.data.vae import Vae
from promoe_ds.diffusion import SamplingPlan, choose_scale
from promoe_ds.distributed.context import DistributedContext, single_process
from promoe_ds.distributed.process_group import check_device
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.evaluation.images import draws_pixels, make_grid, save_png, to_uint8
from promoe_ds.evaluation.sampling import Drawer, align_weights, is_exact, threads_of, units
from promoe_ds.evaluation.sharded_model import load_sharded_model
from promoe_ds.evaluation.store import SampleStore
from promoe_ds.logs import get_logger
from promoe_ds.model.export import WEIGHTS_STEM, load_model, read_export_config, read_export_origin
from promoe_ds.randomness import generator
from promoe_ds.versions import device_name, versions_of

_LOG = get_logger("sample")

LABEL_RULES = ("balanced", "random")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GRID_COLUMNS = 20
_GRID_IMAGE_SIZE = 40


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to draw; None takes the recipe's default, or what fits the device."""

    model: Path
    out: Path
    classes: tuple[int, ...] | None = None
    labels: str = "balanced"
    num: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    solver: str | None = None
    seed: int = 0
    batch_size: int = 64
    device: str | None = None
    dtype: str = "fp32"
    vae: str | None = None
    exact: bool | None = None
    ep_size: int = 1
    grid: bool = False


def draw_samples(request: SampleRequest, team: DistributedContext | None = None) -> list[Path]:
    """Draw and write samples; all ranks call this together. Return what rank 0 wrote.

    Models of pixels (one or three channels), and of latents with an autoencoder to decode them, give PNG files and
    `samples.npz` (ADM's layout: `arr_0` uint8 NHWC, plus `labels`); others give `latents.safetensors`, unscaled.
    Raises: ConfigError for labels, numbers or an output folder that cannot be; CheckpointError for the export.
    """
    team = team or single_process(check_device(request.device))
    config = read_export_config(request.model)
    labels, plan = choose_labels(request, config), make_plan(request, config)
    exact = is_exact(request.exact, config, team.device)
    vae = _load_vae(request, config, team)
    store = SampleStore(request.out, labels, shape=_shape(config, vae), as_images=vae is not None or draws_pixels(config))
    settings = team.on_main(lambda: _settings(request, plan, exact, vae))
    environment = {"device": device_name(team.device), "versions": versions_of("diffusers", "numpy")}
    network = load_model(request.model, device=team.device, dtype=DTYPES[request.dtype]) if request.ep_size == 1 else (
        load_sharded_model(request.model, team, ep_size=request.ep_size, dtype=DTYPES[request.dtype], exact=exact))
    if exact:
        align_weights(network)
    team.on_main(lambda: store.claim({**settings, "num": len(labels)}, environment))
    todo = team.on_main(store.missing)
    job = _Job(request, store, Drawer(network, config, plan, seed=request.seed, device=team.device), vae)
    # Twice: files that a broken disk or a crash has damaged are found where all are put together, and drawn anew.
    for _ in range(2):
        with threads_of(exact=exact):
            _run(job, units(todo, size=1 if exact else request.batch_size, num=len(labels)), team, lockstep=request.ep_size > 1)
        team.barrier()
        if not (todo := team.on_main(store.assemble)):
            return team.on_main(lambda: _finish(request, store))
    raise ConfigError(f"--out {request.out}: {len(todo)} samples, the first of them {todo[0]}, cannot be read back after they were "
                      "written twice: check the disk")


@dataclass(frozen=True)
class _Job:
    request: SampleRequest
    store: SampleStore
    drawer: Drawer
    vae: Vae | None

    def draw(self, indices: range) -> np.ndarray:
        """Return images (B, H, W, C) uint8, or latents (B, Z, H, W), of one pass.

        Raises: CheckpointError if they are not finite.
        """
        latents = self.drawer.draw(indices, self.store.labels[indices.start:indices.stop])
        values = latents if self.vae is None else self.vae.decode(latents)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.request.model}: the samples are not finite: the weights are no trained model's")
        return to_uint8(values.cpu().numpy()) if self.store.as_images else values.cpu().numpy()


def _run(job: _Job, passes: list[range], team: DistributedContext, *, lockstep: bool) -> None:
    """Make this rank's share of the passes; under expert parallelism all ranks make equally many, some for nothing."""
    own = passes[team.rank::team.world_size]
    rounds = -(-len(passes) // team.world_size) if lockstep else len(own)
    total = sum(len(indices) for indices in passes)
    with tqdm(total=total, unit="image", disable=None if team.is_main else True) as progress:
        for number in range(rounds):
            spare = number >= len(own)
            indices = passes[-1] if spare else own[number]
            values = job.draw(indices)
            if spare:
                continue
            for index, value in zip(indices, values, strict=True):
                job.store.write(index, value)
            # The other ranks are about as far: the rate shown is the job's.
            progress.update(min(len(indices) * team.world_size, total - progress.n))


def choose_labels(request: SampleRequest, config: RunConfig) -> np.ndarray:
    """Return the label of every image, a function of its index: in turn, or drawn from (seed, index)."""
    classes = request.classes or tuple(range(config.model.num_classes))
    wrong = [label for label in classes if not 0 <= label < config.model.num_classes]
    if wrong:
        raise ConfigError(f"--classes {wrong[0]}: this model knows the classes 0 ... {config.model.num_classes - 1}")
    count = 10 * len(classes) if request.num is None else request.num
    for name, value in (("--num", count), ("--steps", request.steps), ("--batch-size", request.batch_size),
                        ("--ep-size", request.ep_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    if not 0 <= request.seed < 2**63:
        raise ConfigError(f"--seed {request.seed}: must be at least 0 and below 2**63")
    if request.labels == "random":
        places = [int(generator(request.seed, "sample", 2, index).integers(len(classes))) for index in range(count)]
    else:
        places = [index % len(classes) for index in range(count)]
    return np.array(classes, dtype=np.int64)[places]


def make_plan(request: SampleRequest, config: RunConfig) -> SamplingPlan:
    """Return how to sample: the request's wishes over the recipe's defaults.

    Raises: ConfigError if they do not fit the objective.
    """
    problem = config.diffusion.sampling_problem(solver=request.solver, steps=request.steps)
    if problem:
        raise ConfigError(f"--{problem}")
    scale, why = choose_scale(config, request.cfg_scale, "--cfg-scale")
    if why:
        _LOG.warning("%s", why)
    solver = config.diffusion.solvers[0] if request.solver == "auto" else request.solver
    return SamplingPlan.of(config, steps=request.steps, cfg_scale=scale, solver=solver)


def _load_vae(request: SampleRequest, config: RunConfig, team: DistributedContext) -> Vae | None:
    if request.vae is None:
        return None
    if draws_pixels(config):
        raise ConfigError(f"--vae {request.vae}: this is a model of pixels, leave it out")
    vae = Vae(request.vae, device=team.device)
    identity = vae.identity
    scale = config.data.latent_scale
    if identity.latent_channels != config.model.in_channels or abs(identity.scaling_factor - scale) > 1e-6:
        raise ConfigError(f"--vae {request.vae}: has {identity.latent_channels} latent channels scaled by "
                          f"{identity.scaling_factor}, this model was trained on {config.model.in_channels} scaled by {scale}")
    if config.data.vae is not None and not identity.is_called(config.data.vae):
        _LOG.warning("decoding with %s (%s); the model was trained on latents of %s", identity.name, identity.fingerprint,
                     config.data.vae)
    return vae


def _shape(config: RunConfig, vae: Vae | None) -> tuple[int, int, int]:
    """Return the shape of one file's content: an image's (H, W, C), or a latent's (Z, H, W)."""
    side = config.model.input_size
    if vae is not None:
        return side * vae.identity.downsampling, side * vae.identity.downsampling, 3
    return (side, side, config.model.in_channels) if draws_pixels(config) else (config.model.in_channels, side, side)


def _settings(request: SampleRequest, plan: SamplingPlan, exact: bool, vae: Vae | None) -> dict[str, Any]:
    """Return all that decides what the images are, but for the software and the machine, and where they come from."""
    return {
        "model": str(request.model), "origin": read_export_origin(request.model), "weights": _checksum(request.model),
        "seed": request.seed, "labels": request.labels, "classes": request.classes, "solver": plan.solver, "steps": plan.steps,
        "cfg_scale": plan.cfg_scale, "shift": plan.shift, "dtype": request.dtype, "exact": exact,
        "batch_size": None if exact else request.batch_size, "vae": None if vae is None else vae.identity.fingerprint,
        "uint8": "clamp(127.5 * x + 128, 0, 255), truncated",
        # Named where it is so: folders of other methods go on as they were begun.
        **({"guidance": "two passes"} if plan.two_passes else {})}


def _checksum(export: Path) -> str:
    """Return the checksum of the checksums of an export's weights: reads them once."""
    parts = [checksum(path) for path in sorted(export.glob(f"{WEIGHTS_STEM}*.safetensors"))]
    return f"xxh3_64:{xxhash.xxh3_64(''.join(parts).encode()).hexdigest()}"


def _finish(request: SampleRequest, store: SampleStore) -> list[Path]:
    written = [store.file]
    if not store.as_images:
        return written
    written.insert(0, store.folder / f"img*.png ({len(store.labels)} files)")
    if request.grid:
        chosen = _first_of_each_class(store.labels)
        images = np.stack([store.read(index) for index in chosen])
        written.append(store.folder / "grid.png")
        zoom = max(1, _GRID_IMAGE_SIZE // images.shape[1])
        columns = int(np.bincount(store.labels[chosen]).max())
        save_png(written[-1], make_grid(images, store.labels[chosen], columns=columns, zoom=zoom))
    return written


def _first_of_each_class(labels: np.ndarray) -> list[int]:
    return sorted(index for label in np.unique(labels) for index in np.flatnonzero(labels == label)[:_GRID_COLUMNS].tolist())
