"""Sampling images of classes or prompts from an export, on one process or many; a stopped job
resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from promoe_ds.checkpoint.manifest import checksum
from promoe_ds.config import RunConfig
from promoe_ds.config.model import size_name
from promoe_ds.data.reading import warn_once
from promoe_ds.data.text_encoder import TextIdentity
from promoe_ds.data.vae import Vae
from promoe_ds.diffusion.sampler import SamplingPlan
from promoe_ds.distributed.context import DistributedContext, single_process
from promoe_ds.distributed.process_group import check_device
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.evaluation.features import Extractor, load_extractor
from promoe_ds.evaluation.grids import as_picture, captioned_grid, make_grid
from promoe_ds.evaluation.images import (
    FEATURES_FILE,
    SampleFolder,
    draws_pixels,
    image_shape,
    to_uint8,
)
from promoe_ds.evaluation.reference import save_features
from promoe_ds.evaluation.sample_request import (
    SampleRequest,
    choose_labels,
    choose_size,
    expand_series,
    load_conditions,
    make_plan,
)
from promoe_ds.evaluation.sampling import (
    LatentSampler,
    align_weights,
    aligned_passes,
    one_thread,
    sampling_dtype,
)
from promoe_ds.evaluation.sharded_model import load_sharded_model
from promoe_ds.evaluation.sources import NpzImages
from promoe_ds.logs import Progress, get_logger
from promoe_ds.model.dit import DiT
from promoe_ds.model.export import (
    WEIGHTS_STEM,
    load_model,
    read_export_config,
)
from promoe_ds.versions import device_name, versions_of

_LOG = get_logger("sample")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GRID_COLUMNS = 20
_GRID_IMAGE_SIZE = 40
_GRID_PROMPTS = 100


def draw_samples(
    request: SampleRequest,
    team: DistributedContext | None = None,
    *,
    checkpoint_steps: Sequence[int] = (),
    cfg_scales: Sequence[float] = (),
) -> list[Path]:
    """Sample and write images; all ranks call this together. Return the files of them, by rank 0.

    Models of pixels (one or three channels), and of latents with an autoencoder to decode them,
    give PNG files and `samples.npz` (ADM's layout: `arr_0` uint8 NHWC, plus `labels`); others give
    `latents.safetensors`, unscaled. Of prompts, `labels` are their places among the request's, each
    PNG file carries its own as text, and `prompts.json` maps files to prompts. With an extractor,
    `features.npz` states the statistics of its features. Complete folders are left as they are.
    Args:
        checkpoint_steps, cfg_scales: several jobs in one, see `expand_series`.
    Raises: ConfigError for labels, prompts, numbers or an output folder that cannot be; DataError
        for an encoder that cannot be loaded; CheckpointError for the export.
    """
    team = team or single_process(check_device(request.device))
    jobs = team.on_main(lambda: expand_series(request, checkpoint_steps, cfg_scales))
    for job in jobs if len(cfg_scales) > 1 else ():  # what cannot be is found before any image
        make_plan(job, read_export_config(job.model)[0])
    return [path for job in jobs for path in _draw_folder(job, team)]


def _draw_folder(request: SampleRequest, team: DistributedContext) -> list[Path]:
    extractor = None
    if request.features is not None:
        extractor = load_extractor(request.features, team.device)
    folder = _draw(request, extractor, team)
    written = team.on_main(lambda: _finish(request, folder))
    if extractor is not None:
        written.append(folder.path / FEATURES_FILE)
        images = NpzImages(folder.whole)
        save_features(written[-1], images, extractor, team, batch_size=request.batch_size)
    return written


def _draw(
    request: SampleRequest, extractor: Extractor | None, team: DistributedContext
) -> SampleFolder:
    """Draw what is missing; return the folder. All that can be wrong with the request is found
    before the first image.
    """
    (config, origin), exact = read_export_config(request.model), request.exact
    labels, plan = choose_labels(request, config), make_plan(request, config)
    size = choose_size(request, config)
    vae = _load_vae(request, config, team)
    conditions, encoder = load_conditions(request, config, team.device)
    as_images = vae is not None or draws_pixels(config)
    shape = image_shape(config, vae, size)
    own_size = size == config.model.latent_size
    request = replace(_with_dtype(request, team.device), size=None if own_size else size)
    folder = SampleFolder(
        request.out,
        labels,
        shape if as_images else (config.model.in_channels, *size),
        as_images,
        request.prompts,
    )
    if extractor is not None:
        _check_features(extractor, folder)
    settings = team.on_main(lambda: _settings(request, plan, vae, encoder))
    settings |= {"origin": origin, "num": len(labels)}
    if team.on_main(lambda: folder.is_complete(settings)):
        _LOG.info("%s: all %d samples are there", request.out, len(labels))
        return folder
    network = _load_network(request, team)
    versions = versions_of("diffusers", "numpy")
    environment = {"device": device_name(team.device), "versions": versions}
    team.on_main(lambda: folder.open(settings, environment))
    todo = team.on_main(folder.missing)
    sampler = LatentSampler(network, config, plan, seed=request.seed, device=team.device, size=size)

    def sample(indices: range) -> np.ndarray:
        """Return images (B, H, W, C) uint8, or latents (B, Z, H, W), of one pass."""
        own = labels[indices.start : indices.stop]
        latents = sampler.sample(indices, *conditions(own))
        values = latents if vae is None else vae.decode(latents)
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{request.model}: the samples are not finite: no trained model's weights"
            )
        return to_uint8(values.cpu().numpy()) if as_images else values.cpu().numpy()

    # Twice: files that a broken disk or a crash has damaged are found where all are put together.
    for _ in range(2):
        passes = aligned_passes(todo, size=1 if exact else request.batch_size, num=len(labels))
        with one_thread() if exact else nullcontext():
            _run(passes, sample, folder, team, in_lockstep=request.ep_size > 1)
        team.barrier()
        if not (todo := team.on_main(folder.assemble)):
            return folder
    raise ConfigError(
        f"--out {request.out}: {len(todo)} samples, the first of them {todo[0]}, cannot be read "
        "back after they were written twice: check the disk"
    )


def _run(
    passes: list[range],
    sample: Callable[[range], np.ndarray],
    folder: SampleFolder,
    team: DistributedContext,
    *,
    in_lockstep: bool,
) -> None:
    """Make this rank's share of the passes; under expert parallelism all make equally many."""
    own = passes[team.rank :: team.world_size]
    progress = Progress(_LOG, sum(map(len, passes)), "images")
    for indices in own:
        for index, value in zip(indices, sample(indices), strict=True):
            folder.write(index, value)
        progress.add(len(indices) * team.world_size)  # the other ranks are about as far
    if in_lockstep and len(own) * team.world_size < len(passes):
        sample(passes[-1])  # for the other ranks' rows that come to the experts here


def _load_network(request: SampleRequest, team: DistributedContext) -> DiT:
    dtype, exact = DTYPES[str(request.dtype)], request.exact
    if request.ep_size == 1:
        network = load_model(request.model, device=team.device, dtype=dtype)
    else:
        network = load_sharded_model(
            request.model, team, ep_size=request.ep_size, dtype=dtype, exact=exact
        )
    if exact:
        align_weights(network)
    return network


def _check_features(extractor: Extractor, folder: SampleFolder) -> None:
    """Raise ConfigError if an extractor cannot tell the statistics of what a folder is to hold."""
    if not folder.as_images:
        raise ConfigError("--features: latents have none: decode them by --vae")
    if len(folder.labels) < 2:
        raise ConfigError("--features: the statistics of one image are none: raise --num")
    extractor.probe(folder.shape[:2], folder.shape[2])


def _load_vae(request: SampleRequest, config: RunConfig, team: DistributedContext) -> Vae | None:
    if request.vae is None:
        return None
    if draws_pixels(config):
        raise ConfigError(f"--vae {request.vae}: this is a model of pixels, leave it out")
    vae = Vae(request.vae, device=team.device)
    identity = vae.identity
    if misfit := identity.misfit(config):
        raise ConfigError(f"--vae {request.vae}: has {misfit}")
    if config.data.vae is not None and not identity.is_called(config.data.vae):
        warn_once(
            "decoding with %s (%s); the model was trained on latents of %s",
            identity.name,
            identity.fingerprint,
            config.data.vae,
        )
    return vae


def _with_dtype(request: SampleRequest, device: torch.device) -> SampleRequest:
    """Return the request with the dtype of the network, and say it."""
    default = next(name for name, each in DTYPES.items() if each == sampling_dtype(device))
    why = "" if request.dtype else " (the default there; --dtype asks otherwise)"
    _LOG.info("sampling in %s on %s%s", request.dtype or default, device.type, why)
    return replace(request, dtype=request.dtype or default)


def _settings(
    request: SampleRequest, plan: SamplingPlan, vae: Vae | None, encoder: TextIdentity | None
) -> dict[str, Any]:
    """Return all that decides the images, but for the software and the machine."""
    return {
        "model": str(request.model),
        "weights": _checksum(request.model),
        "seed": request.seed,
        "labels": request.labels,
        # None, as in earlier folders, where it is the model's own.
        "size": request.size and size_name(request.size),
        "classes": request.classes and list(request.classes),
        "solver": plan.solver,
        "steps": plan.steps,
        "cfg_scale": plan.cfg_scale,
        "cfg_interval": plan.cfg_interval and list(plan.cfg_interval),
        "shift": plan.shift,
        "dtype": request.dtype,
        "exact": request.exact,
        "batch_size": None if request.exact else request.batch_size,
        "vae": None if vae is None else vae.identity.fingerprint,
        "prompts": list(request.prompts) or None,
        "negative_prompt": request.negative_prompt,
        "text_encoder": encoder and encoder.fingerprint,
        "uint8": "clamp(127.5 * x + 128, 0, 255), truncated",
        # Stated only where it is so: earlier folders of other methods resume.
        **({"guidance": "two passes"} if plan.two_passes else {}),
    }


def _checksum(export: Path) -> str:
    """Return the checksum of the checksums of an export's weights: reads them once."""
    parts = [checksum(path) for path in sorted(export.glob(f"{WEIGHTS_STEM}*.safetensors"))]
    return f"xxh3_64:{xxhash.xxh3_64(''.join(parts).encode()).hexdigest()}"


def _finish(request: SampleRequest, folder: SampleFolder) -> list[Path]:
    """Return the files of a complete folder; draw the grid if it is wanted."""
    if not folder.as_images:
        return [folder.whole]
    written = [folder.path / f"img*.png ({len(folder.labels)} files)", folder.whole]
    if request.grid:
        written.append(folder.path / "grid.png")
        _grid(folder).save(written[-1], format="PNG")
    return written


def _grid(folder: SampleFolder) -> Image.Image:
    """Return one row a class; of prompts, all in turn with their captions."""
    labels = folder.labels
    of_label = (np.flatnonzero(labels == label)[:_GRID_COLUMNS] for label in np.unique(labels))
    chosen = np.sort(np.concatenate(list(of_label)))
    if folder.prompts:
        chosen = chosen[:_GRID_PROMPTS]
    images = np.stack([folder.read(index) for index in chosen.tolist()])
    if folder.prompts:
        captions = [folder.prompts[label] for label in labels[chosen]]
        return captioned_grid(images, captions)
    columns = int(np.bincount(labels[chosen]).max())
    zoom = max(1, _GRID_IMAGE_SIZE // images.shape[1])
    return as_picture(make_grid(images, labels[chosen], columns=columns, zoom=zoom))
