"""The walk from one format to another: every tensor read once, written once, and read back."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from promoe_ds.checkpoint.conversion.posthoc import PosthocSource
from promoe_ds.checkpoint.conversion.published_source import OfficialSource
from promoe_ds.checkpoint.conversion.sources import Source, SourceInfo, open_folder
from promoe_ds.checkpoint.conversion.targets import TARGETS, Content, Target
from promoe_ds.checkpoint.zero_files import MOMENTS, WEIGHTS
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.errors import CheckpointError
from promoe_ds.logs import Progress, get_logger
from promoe_ds.model.shards import MAX_SHARD_BYTES, digest
from promoe_ds.model.state import POSITIONS, buffer_names

_LOG = get_logger("convert")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNFINISHED = ".unfinished"
#: Files are not cut smaller than this to spare memory.
_SMALLEST_SHARD_BYTES = 32 * 10**6


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, to what; which options fit which target is the command's to check.

    weights: "ema" (the first average), "raw", an average's name, or None: "ema" for the formats
        that hold one set of weights, all as they are for the others.
    ema_sigma_rel: relative length of the average to take, mixed from the power-function averages
        that a run kept.
    """

    destination: Path
    to: str
    weights: str | None = None
    with_optimizer: bool = False
    dtype: str = "fp32"
    verify: bool = True
    max_shard_bytes: int = MAX_SHARD_BYTES
    vae: str | None = None
    text_encoder: str | None = None
    ema_sigma_rel: float | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    step: of the target; kinds: the target's kind -> the source's kind.
    values: how many values were read from the source, each once; bytes: written.
    """

    source: SourceInfo
    step: int
    kinds: dict[str, str]
    parameters: int
    values: int
    bytes: int
    note: str


def convert(source_path: Path, request: Request, config: RunConfig | None = None) -> Conversion:
    """Convert a checkpoint.

    Args:
        source_path: as for `open_source`; config: of a published file.
    Raises: as `convert_source`.
    """
    refuse_existing(request.destination)
    if request.ema_sigma_rel is None:
        return convert_source(open_source(source_path, config), request)
    return convert_source(PosthocSource(source_path, request.ema_sigma_rel), request)


def open_source(path: Path, config: RunConfig | None = None, *, flag: str = "--recipe") -> Source:
    """Recognise a checkpoint's format and open it.

    Args:
        path: a published `.pth` file, or a folder as `open_folder` takes it.
        config: the architecture of a published file, which holds none; flag: how a user names it.
    Raises: CheckpointError if it is none of them, damaged, or the config is missing or has no use.
    """
    if path.is_file():
        if config is None:
            raise CheckpointError(
                f"{path} does not hold its architecture: name its recipe with {flag}"
            )
        return OfficialSource(path, config)
    if config is not None:
        raise CheckpointError(
            f"{flag}: {path} is a folder, which holds its own architecture: leave it out"
        )
    return open_folder(path)


def refuse_existing(destination: Path) -> None:
    """Raise CheckpointError if the destination is there and not an empty folder.

    What a killed conversion left there does not count.
    """
    if destination.is_symlink() and not destination.exists():
        raise CheckpointError(
            f"{destination} is a link to {destination.readlink()}, which is not there: make that "
            "folder, or choose another destination"
        )
    if destination.exists() and (
        not destination.is_dir() or any(path.name != _UNFINISHED for path in destination.iterdir())
    ):
        raise CheckpointError(
            f"{destination} exists already: choose another destination, or delete it"
        )


def convert_source(source: Source, request: Request) -> Conversion:
    """Write what a source holds in the format that is asked for.

    Raises: CheckpointError naming the file that is missing or damaged, the tensor that was not
        read, read twice, left over or does not fit, or that reads back differently. The destination
        exists only if all went well.
    """
    final, info = request.destination.absolute(), source.info
    if info.largest_file is not None:
        # A file that is written is held in memory, twice while safetensors does it: together no
        # more than one file of the source.
        largest = max(info.largest_file // 2, _SMALLEST_SHARD_BYTES)
        request = replace(request, max_shard_bytes=min(request.max_shard_bytes, largest))
    kinds = _choose_kinds(source, request)
    content = _describe(source, request, kinds)
    # An empty folder may be a mount or a link, which cannot be replaced: write inside it.
    folder = final.with_name(f"{final.name}{_UNFINISHED}")
    if final.is_dir():
        folder = final / _UNFINISHED
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        digests, values = _copy(source, TARGETS[request.to](folder, content), content, kinds)
        if request.verify:
            _verify(folder, request, content, digests)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _publish(folder, final)
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot be written: {error}: free the disk, or take another place"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    weights = next(iter(content.kinds.values()))
    return Conversion(
        source=info,
        step=content.step,
        kinds=kinds,
        parameters=sum(
            math.prod(shape) for name, shape in weights.items() if name not in content.buffers
        ),
        values=values,
        bytes=size,
        note="; ".join(filter(None, [info.note, *_notes(source, request, kinds)])),
    )


def find_weights(source: Source, weights: str | None) -> str:
    """Return the source's kind that a user's word names; None: an average where there is one.

    Raises: CheckpointError naming what the source holds.
    """
    averages = [kind for kind in source.kinds if kind.startswith(EMA)]
    known = {"raw": WEIGHTS} if WEIGHTS in source.kinds else {}
    if averages:
        known |= {"ema": averages[0], **{kind: kind for kind in averages}}
    wanted = weights or ("ema" if averages else "raw")
    if wanted not in known:
        raise CheckpointError(
            f"{source.info.path}: holds no {wanted} weights, only {', '.join(known)}"
        )
    return known[wanted]


def with_latents_of(config: RunConfig, saved: RunConfig) -> RunConfig:
    """Return the config of a run that takes over a saved run's weights, with what its latents were
    normalised by: sampling asks for it, and training compares it with the data's own.
    """
    data = {"latent_normalization": "auto", "latents_normalized": False}
    data |= asdict(LatentNormalization.of(saved.data))
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _notes(source: Source, request: Request, kinds: dict[str, str]) -> list[str]:
    """Return what the target does otherwise than the source."""
    notes, config = [], source.info.config
    # diffusers' scheduler of a flow takes Euler's steps.
    if request.to == "diffusers" and config.resolved_solver not in ("euler", "ddpm", "ddim"):
        notes.append(f"the recipe samples with {config.resolved_solver}, the pipeline with euler")
    if request.to == "deepspeed":
        if any(POSITIONS in source.kinds[taken] for taken in kinds.values()):
            notes.append(
                "the file's averaged position table was left out: training uses the fixed one"
            )
        return notes
    averages = config.optimizer.averages
    for kind in dict.fromkeys(kinds.values()):
        updates = source.info.step - source.info.averages_since.get(kind, 0)
        if kind in averages and updates > 0:
            notes += filter(None, [averages[kind].warning(kind, updates)])
    return notes


def _choose_kinds(source: Source, request: Request) -> dict[str, str]:
    """Return the target's kinds, in order, each with the source's kind that fills it."""
    averages = [kind for kind in source.kinds if kind.startswith(EMA)]
    moments = {kind: kind for kind in MOMENTS if kind in source.kinds}
    if request.with_optimizer and len(moments) < len(MOMENTS):
        raise CheckpointError(
            f"{source.info.path}: holds no whole optimizer state, only {', '.join(source.kinds)}: "
            "leave --with-optimizer out"
        )
    extra = moments if request.with_optimizer else {}
    if request.to in ("single", "diffusers"):
        model = find_weights(source, request.weights)
        others = [kind for kind in source.kinds if extra and kind not in moments]
        return {model: model} | {kind: kind for kind in others} | extra
    model = WEIGHTS if WEIGHTS in source.kinds else averages[0]
    if request.weights:
        model, averages = find_weights(source, request.weights), []
    if request.to == "official":
        return {WEIGHTS: model, EMA: [*averages, model][0]} | extra
    return {WEIGHTS: model} | {kind: kind for kind in averages} | extra


def _describe(source: Source, request: Request, kinds: dict[str, str]) -> Content:
    info = source.info
    # Without the optimizer's state nothing can continue: a new run starts, from these weights.
    starts = request.to == "deepspeed" and not request.with_optimizer
    left_out = {POSITIONS} if request.to == "deepspeed" else ()
    return Content(
        config=info.config,
        step=0 if starts else info.step,
        samples_seen=0 if starts else info.samples_seen,
        optimizer_step=source.optimizer_step if request.with_optimizer else None,
        dtype=DTYPES[request.dtype],
        kinds={
            kind: {
                name: source.shapes[name] for name in source.kinds[taken] if name not in left_out
            }
            for kind, taken in kinds.items()
        },
        averages_since={} if starts else info.averages_since,
        buffers=frozenset([*buffer_names(info.config), POSITIONS]),
        origin={"source": info.format, **info.origin},
        max_shard_bytes=request.max_shard_bytes,
        vae=request.vae,
        text_encoder=request.text_encoder,
    )


def _copy(
    source: Source, target: Target, content: Content, kinds: dict[str, str]
) -> tuple[dict[tuple[str, str], str], int]:
    """Copy every tensor; return digests of what was written and the number of values read."""
    digests, values, path = {}, 0, source.info.path
    total = sum(
        4 * math.prod(shape) for named in content.kinds.values() for shape in named.values()
    )
    progress = Progress(_LOG, total / 1e9, "GB")
    for taken in dict.fromkeys(kinds.values()):
        filled = [kind for kind, from_kind in kinds.items() if from_kind == taken]
        for name in source.kinds[taken]:
            value = source.read(taken, name)
            is_rounded = value.dtype != torch.float32 and name not in content.buffers
            if MOMENTS[0] in content.kinds and is_rounded:
                raise CheckpointError(
                    f"{path}: {taken} of {name} is of type {value.dtype}: no run continues "
                    "exactly from rounded weights: leave --with-optimizer out"
                )
            for kind in (kind for kind in filled if name in content.kinds[kind]):
                written = value.to(content.dtype_of(kind, name)).contiguous()
                is_half = written.dtype == torch.float16
                if is_half and written.isinf().any() and not value.isinf().any():
                    raise CheckpointError(
                        f"{path}: {taken} of {name} reaches {value.abs().max():g}, beyond "
                        "fp16: use --dtype bf16 or fp32"
                    )
                digests[kind, name] = target.write(kind, name, written)
                progress.add(value.numel() * 4 / 1e9)
        values += source.check(taken)
    target.close()
    return digests, values


def _verify(
    folder: Path, request: Request, content: Content, digests: dict[tuple[str, str], str]
) -> None:
    """Read the target back, by its format's own reader, and compare every tensor."""
    if request.to == "official":
        written = open_source(next(folder.glob("*.pth")), content.config)
    else:
        written = open_folder(folder, check=False)  # all tensors are about to be compared
    for kind, shapes in content.kinds.items():
        for name in shapes:
            if digest(written.read(kind, name)) != digests[kind, name]:
                raise CheckpointError(
                    f"{written.info.path}: {kind} of {name} reads back differently: check "
                    "the disk, then convert again"
                )
        written.check(kind)


def _publish(folder: Path, final: Path) -> None:
    """Flush the finished folder and give it its name, or move its files up into `final`."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.parent != final:
        folder.rename(final)
        return
    # Configs last: by these a format is recognised.
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
        path.rename(final / path.name)
