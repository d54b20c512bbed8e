"""Drawing labelled samples from an export: image i depends on (seed, i) and its label only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from promoe_ds.config import RunConfig
from promoe_ds.diffusion.sampler import SamplingPlan, image_generators, initial_noise, sample_latents
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.evaluation.images import image_name, make_grid, save_png, to_uint8
from promoe_ds.model.export import load_model

_GRID_COLUMNS = 20
_GRID_IMAGE_SIZE = 40


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to draw; None takes the recipe's default."""

    model: Path
    out: Path
    classes: tuple[int, ...] | None = None
    num: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    solver: str | None = None
    seed: int = 0
    batch_size: int = 64
    device: str | None = None
    grid: bool = False


def draw_samples(request: SampleRequest) -> list[Path]:
    """Draw and write samples; return what was written.

    Pixel-space models (one or three channels) give PNG files and `samples.npz` (ADM's layout: `arr_0` uint8 NHWC, plus
    `labels`); latent-space models give `latents.safetensors`, unscaled, to be decoded by their autoencoder.
    Raises: ConfigError for labels, numbers or an output folder that cannot be; CheckpointError for the export.
    """
    device = _device(request.device)
    model = load_model(request.model, device=device)
    labels = _labels(request, model.config)
    plan = _plan(request, model.config)
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise ConfigError(f"--out {request.out} is no empty folder: choose another one")
    latents = _draw(request, model, labels, plan, device)
    if not torch.isfinite(latents).all():
        raise CheckpointError(f"{request.model}: the samples are not finite: the weights are no trained model's")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        return _write(request, model.config, latents.cpu(), labels)
    except OSError as error:
        raise ConfigError(f"--out {request.out}: {error}") from None


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _labels(request: SampleRequest, config: RunConfig) -> np.ndarray:
    classes = request.classes or tuple(range(config.model.num_classes))
    wrong = [label for label in classes if not 0 <= label < config.model.num_classes]
    if wrong:
        raise ConfigError(f"--classes {wrong[0]}: this model knows the classes 0 ... {config.model.num_classes - 1}")
    count = 10 * len(classes) if request.num is None else request.num
    for name, value in (("--num", count), ("--steps", request.steps), ("--batch-size", request.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    if request.cfg_scale is not None and not 0 <= request.cfg_scale < math.inf:
        raise ConfigError(f"--cfg-scale {request.cfg_scale}: must be a number from 0 on; up to 1 there is no guidance")
    if request.seed < 0:
        raise ConfigError(f"--seed {request.seed}: must be at least 0")
    return np.array([classes[i % len(classes)] for i in range(count)], dtype=np.int64)


def _plan(request: SampleRequest, config: RunConfig) -> SamplingPlan:
    problem = config.diffusion.sampling_problem(solver=request.solver, steps=request.steps)
    if problem:
        raise ConfigError(f"--{problem}")
    sampling = {name: getattr(request, name) for name in ("steps", "cfg_scale", "solver") if getattr(request, name) is not None}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=sampling)})
    return SamplingPlan(
        steps=config.sampling.steps, cfg_scale=config.sampling.cfg_scale, null_label=config.model.null_label,
        shift=config.diffusion.shift, solver=config.resolved_solver, num_train_timesteps=config.diffusion.num_train_timesteps)


def _draw(request: SampleRequest, model: torch.nn.Module, labels: np.ndarray, plan: SamplingPlan, device: str) -> torch.Tensor:
    config: RunConfig = model.config
    shape = (config.model.in_channels, config.model.input_size, config.model.input_size)
    parts = []
    with tqdm(total=len(labels), unit="image", disable=None) as progress:
        for start in range(0, len(labels), request.batch_size):
            indices = range(start, min(start + request.batch_size, len(labels)))
            noise = initial_noise(shape, seed=request.seed, indices=indices).to(device)
            generators = image_generators(seed=request.seed, indices=indices)
            chosen = torch.from_numpy(labels[start:indices.stop]).to(device)
            parts.append(sample_latents(model, noise, chosen, plan, generators))
            progress.update(len(indices))
    return torch.cat(parts) / config.data.latent_scale


def _write(request: SampleRequest, config: RunConfig, latents: torch.Tensor, labels: np.ndarray) -> list[Path]:
    if config.model.in_channels not in (1, 3):
        path = request.out / "latents.safetensors"
        save_file({"latents": latents, "labels": torch.from_numpy(labels)}, path)
        return [path]
    images = to_uint8(latents.numpy())
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        save_png(request.out / image_name(index, label), image)
    written = [request.out / image_name(0, int(labels[0])), request.out / "samples.npz"]
    np.savez(written[1], arr_0=images, labels=labels)
    if request.grid:
        written.append(request.out / "grid.png")
        zoom = max(1, _GRID_IMAGE_SIZE // config.model.input_size)
        save_png(written[-1], make_grid(images, labels, columns=min(_GRID_COLUMNS, len(labels)), zoom=zoom))
    return [written[0].parent / f"img*.png ({len(images)} files)", *written[1:]]
