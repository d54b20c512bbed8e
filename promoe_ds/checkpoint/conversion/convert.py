"""The walk from one format to another: every tensor read once, written once, and read back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from promoe_ds.checkpoint.conversion.posthoc import PosthocSource
from promoe_ds.checkpoint.conversion.published_source import OfficialSource
from promoe_ds.checkpoint.conversion.sources import Source, open_folder
from promoe_ds.checkpoint.conversion.targets import Content, OfficialTarget, PipelineTarget, SingleTarget, Target, TrainingTarget
from promoe_ds.checkpoint.zero_reader import MOMENTS, WEIGHTS
from promoe_ds.config.optimizer import EMA
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.logs import Progress, get_logger
from promoe_ds.model.shards import MAX_SHARD_BYTES, digest
from promoe_ds.model.state import POSITIONS, buffer_names

_LOG = get_logger("convert")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The published layout's place for the moving average.
_OFFICIAL_AVERAGE = EMA
_UNFINISHED = ".unfinished"
#: Files are not cut smaller than this to spare memory.
_SMALLEST_SHARD_BYTES = 32 * 10**6


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, to what.

    weights: "ema" (the first average), "raw", an average's name, or None: "ema" for the formats that hold one set of
        weights, all as they are for the others.
    ema_sigma_rel: relative length of the average to take, mixed from the power-function averages that a run kept.
    """

    destination: Path
    to: str
    weights: str | None = None
    with_optimizer: bool = False
    dtype: str = "fp32"
    verify: bool = True
    max_shard_bytes: int = MAX_SHARD_BYTES
    vae: str | None = None
    ema_sigma_rel: float | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    kinds: the target's kind -> the source's kind.
    values: how many values were taken from the source, each once; bytes: written.
    """

    source: Path
    source_format: str
    destination: Path
    step: int
    kinds: dict[str, str]
    parameters: int
    values: int
    bytes: int
    verified: bool
    note: str


def convert(source_path: Path, request: Request, config: RunConfig | None = None) -> Conversion:
    """Convert a checkpoint.

    Args:
        source_path: as for `open_source`; config: of a published file.
    Raises: as `convert_source`.
    """
    refuse_existing(request.destination)
    return convert_source(open_source(source_path, config) if request.ema_sigma_rel is None
                          else PosthocSource(source_path, request.ema_sigma_rel), request)


def open_source(path: Path, config: RunConfig | None = None, *, flag: str = "--recipe") -> Source:
    """Recognise a checkpoint's format and open it.

    Args:
        path: a published `.pth` file, or a folder as `open_folder` takes it.
        config: the architecture of a published file, which holds none; flag: how a user names it.
    Raises: CheckpointError if it is none of them, not sound, or the config is missing or has no use.
    """
    if path.is_file():
        if config is None:
            raise CheckpointError(f"{path} does not hold its architecture: name a recipe of it with {flag}")
        return OfficialSource(path, config)
    if config is not None:
        raise CheckpointError(f"{flag}: {path} is a folder, which holds its own architecture: leave it out")
    return open_folder(path)


def refuse_existing(destination: Path) -> None:
    """Raise CheckpointError if the destination is there and not an empty folder, but for what a conversion left that was killed."""
    if destination.is_symlink() and not destination.exists():
        raise CheckpointError(f"{destination} is a link to {destination.readlink()}, which is not there: make that folder, or "
                              "choose another destination")
    if destination.exists() and (not destination.is_dir() or any(path.name != _UNFINISHED for path in destination.iterdir())):
        raise CheckpointError(f"{destination} exists already: choose another destination or remove it")


def convert_source(source: Source, request: Request) -> Conversion:
    """Write what a source holds in the format that is asked for, and close it.

    Raises: CheckpointError naming the file that is missing or damaged, the tensor that was dropped, doubled, left over or
        does not fit, or that reads back differently. The destination exists only if all went well.
    """
    final = request.destination.absolute()
    refuse_existing(final)
    if source.facts.largest_file is not None:
        # A file in the making is held in memory, twice while safetensors writes it: no more than one of the source's in all.
        largest = max(source.facts.largest_file // 2, _SMALLEST_SHARD_BYTES)
        request = replace(request, max_shard_bytes=min(request.max_shard_bytes, largest))
    kinds = _choose_kinds(source, request)
    content = _describe(source, request, kinds)
    # An empty folder may be a mount or a link, which cannot be replaced: then what is written lies inside from the beginning.
    folder = final / _UNFINISHED if final.is_dir() else final.with_name(f"{final.name}{_UNFINISHED}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        digests, values = _copy(source, _open_target(folder, content, request), content, kinds)
        source.close()
        if request.verify:
            _verify(_written(folder, request, content), content, digests)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _publish(folder, final)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    parameters = sum(torch.Size(shape).numel() for name, shape in next(iter(content.kinds.values())).items()
                     if name not in content.buffers)
    facts = source.facts
    return Conversion(source=facts.path, source_format=facts.format, destination=final, step=content.step, kinds=kinds,
                      parameters=parameters, values=values, bytes=size, verified=request.verify,
                      note="; ".join([facts.note] * bool(facts.note) + _notes(source, request, kinds)))


def _notes(source: Source, request: Request, kinds: dict[str, str]) -> list[str]:
    """Say what the target does otherwise than the source."""
    notes, config = [], source.facts.config
    # diffusers' scheduler of a flow takes Euler's steps.
    if request.to == "diffusers" and config.resolved_solver not in ("euler", "ddpm", "ddim"):
        notes.append(f"the recipe samples with {config.resolved_solver}, the pipeline with euler")
    if request.to == "deepspeed" and any(POSITIONS in source.names(taken) for taken in kinds.values()):
        notes.append("the file's averaged position table was left out: training uses the fixed one")
    averages = config.optimizer.averages
    for kind in dict.fromkeys(kinds.values()) if request.to != "deepspeed" else ():
        updates = source.facts.step - source.facts.averages_since.get(kind, 0)
        if kind in averages and updates > 0 and (warning := averages[kind].warning(kind, updates)):
            notes.append(warning)
    return notes


def _choose_kinds(source: Source, request: Request) -> dict[str, str]:
    """Return the target's kinds, in order, each with the source's kind that fills it."""
    averages = [kind for kind in source.kinds if kind.startswith(EMA)]
    moments = [kind for kind in MOMENTS if kind in source.kinds]
    if request.with_optimizer and len(moments) < len(MOMENTS):
        raise CheckpointError(f"{source.facts.path}: holds no whole optimizer state, only {', '.join(source.kinds)}: leave "
                              "--with-optimizer out")
    if request.with_optimizer and request.to == "diffusers":
        raise CheckpointError("--with-optimizer: a diffusers pipeline holds weights only; use --to single, official or deepspeed")
    chosen = _resolve(source, request.weights) if request.weights else None
    extra = {kind: kind for kind in moments} if request.with_optimizer else {}
    if request.to in ("single", "diffusers"):
        model = chosen or _resolve(source, "ema" if averages else "raw")
        rest = [WEIGHTS, *averages] if request.with_optimizer else []
        return {model: model} | {kind: kind for kind in rest if kind in source.kinds and kind != model} | extra
    if chosen and request.with_optimizer:
        raise CheckpointError(f"--weights {request.weights} --with-optimizer: the moments belong to the raw weights; leave one out")
    if chosen:
        model, averages = chosen, [chosen] if request.to == "official" else []
    else:
        model = WEIGHTS if WEIGHTS in source.kinds else averages[0]
    if request.to == "official":
        return {WEIGHTS: model, _OFFICIAL_AVERAGE: averages[0] if averages else model} | extra
    return {WEIGHTS: model} | {kind: kind for kind in averages} | extra


def _resolve(source: Source, weights: str) -> str:
    """Return the source's kind that a user's word names."""
    averages = [kind for kind in source.kinds if kind.startswith(EMA)]
    if weights == "raw" and WEIGHTS in source.kinds:
        return WEIGHTS
    if weights == "ema" and averages:
        return averages[0]
    if weights in averages:
        return weights
    held = [*(["raw"] if WEIGHTS in source.kinds else []), *averages]
    raise CheckpointError(f"{source.facts.path}: holds no {weights} weights, only {', '.join(held)}")


def _describe(source: Source, request: Request, kinds: dict[str, str]) -> Content:
    facts = source.facts
    if request.dtype != "fp32" and request.to == "deepspeed":
        raise CheckpointError(f"--dtype {request.dtype}: training keeps its weights in fp32; leave it out")
    if request.dtype != "fp32" and request.with_optimizer:
        raise CheckpointError(f"--dtype {request.dtype} --with-optimizer: no run goes on exactly from rounded weights: leave one "
                              "out")
    # Without the optimizer's state nothing can go on where it was: a new run starts, from these weights.
    starts = request.to == "deepspeed" and not request.with_optimizer
    names = {kind: {name: source.shape(name) for name in source.names(taken)
                    if name != POSITIONS or request.to != "deepspeed"} for kind, taken in kinds.items()}
    return Content(
        config=facts.config, step=0 if starts else facts.step, samples_seen=0 if starts else facts.samples_seen,
        optimizer_step=source.optimizer_step if request.with_optimizer else None, dtype=DTYPES[request.dtype], kinds=names,
        averages_since={} if starts else facts.averages_since,
        buffers=frozenset([*buffer_names(facts.config), POSITIONS]), origin={"source": facts.format, **facts.origin})


def _copy(source: Source, target: Target, content: Content, kinds: dict[str, str]) -> tuple[dict[tuple[str, str], str], int]:
    """Carry every tensor over; return the digests of what was written and the number of values taken."""
    digests, values = {}, 0
    total = sum(torch.Size(shape).numel() * 4 for shapes in content.kinds.values() for shape in shapes.values())
    progress = Progress(_LOG, total / 1e9, "GB")
    for taken in dict.fromkeys(kinds.values()):
        kept = [kind for kind, from_kind in kinds.items() if from_kind == taken]
        for name in source.names(taken):
            value = source.read(taken, name)
            if MOMENTS[0] in content.kinds and value.dtype != torch.float32 and name not in content.buffers:
                raise CheckpointError(f"{source.facts.path}: {taken} of {name} is of type {value.dtype}: no run goes on "
                                      "exactly from rounded weights: leave --with-optimizer out")
            for kind in kept:
                if name not in content.kinds[kind]:
                    continue
                written = value.to(content.dtype_of(kind, name)).contiguous()
                if written.dtype == torch.float16 and written.isinf().any() and not value.isinf().any():
                    raise CheckpointError(f"{source.facts.path}: {taken} of {name} reaches {value.abs().max():g}, beyond fp16: "
                                          "use --dtype bf16 or fp32")
                digests[kind, name] = target.write(kind, name, written)
                progress.add(value.numel() * 4 / 1e9)
        values += source.check(taken)
    target.close()
    return digests, values


def _verify(written: Source, content: Content, digests: dict[tuple[str, str], str]) -> None:
    """Read the target back, by its format's own reader, and compare every tensor."""
    if missing := [kind for kind in content.kinds if kind not in written.kinds]:
        raise CheckpointError(f"{written.facts.path}: {missing[0]} does not read back")
    for kind, shapes in content.kinds.items():
        for name in shapes:
            if digest(written.read(kind, name)) != digests[kind, name]:
                raise CheckpointError(f"{written.facts.path}: {kind} of {name} reads back differently: the disk is not to be "
                                      "trusted")
        written.check(kind)
    written.close()


def _open_target(folder: Path, content: Content, request: Request) -> Target:
    if request.to == "single":
        return SingleTarget(folder, content, request.max_shard_bytes)
    if request.to == "diffusers":
        return PipelineTarget(folder, content, request.max_shard_bytes, request.vae)
    return OfficialTarget(folder, content) if request.to == "official" else TrainingTarget(folder, content)


def _written(folder: Path, request: Request, content: Content) -> Source:
    if request.to == "official":
        return open_source(next(folder.glob("*.pth")), content.config)
    return open_folder(folder, check=False)  # all tensors are about to be compared


def _publish(folder: Path, final: Path) -> None:
    """Give the finished folder its name, or move its files up into `final`, flushed: before that, nobody sees them."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.parent != final:
        folder.rename(final)
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):  # last: by these a format is recognised
        path.rename(final / path.name)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
