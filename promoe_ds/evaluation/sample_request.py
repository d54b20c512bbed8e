"""What a sampling job is asked for: of which classes or prompts, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from promoe_ds.checkpoint.manifest import (
    list_checkpoints,
    manifest_checksum,
    step_folder,
    step_of,
)
from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config import RunConfig
from promoe_ds.config.model import sides, size_name
from promoe_ds.data.reading import read_text, warn_once
from promoe_ds.data.text_encoder import TextIdentity, encoder_of
from promoe_ds.diffusion import check_guided
from promoe_ds.diffusion.sampler import SamplingPlan
from promoe_ds.errors import CheckpointError, ConfigError, DataError
from promoe_ds.evaluation.images import SETTINGS_FILE
from promoe_ds.evaluation.sampling import plan_sampling
from promoe_ds.logs import get_logger
from promoe_ds.model.export import CONFIG_FILE, read_export_config
from promoe_ds.randomness import generator

_LOG = get_logger("sample")

#: Of images' labels, as `choose_labels` gives them: their conditions, and what to guide them away
# from.
Conditions = Callable[[np.ndarray], tuple[Condition, Condition | None]]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to sample; None takes the recipe's default, or what fits the device."""

    model: Path
    out: Path
    classes: tuple[int, ...] | None = None
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    labels: str = "balanced"
    num: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_interval: tuple[float, ...] | None = None
    solver: str | None = None
    size: int | tuple[int, int] | None = None
    seed: int = 0
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    exact: bool = False
    ep_size: int = 1
    grid: bool = False
    #: An extractor, as `load_extractor` takes it.
    features: str | None = None


def expand_series(
    request: SampleRequest, checkpoint_steps: Sequence[int], cfg_scales: Sequence[float]
) -> list[SampleRequest]:
    """Return the requests that sample checkpoints of a run at some guidance scales, one of each.

    Their folder is `request.out`; below it `step_N` where checkpoints are named, and below that
    `cfg_S` where there are several scales.
    Args:
        checkpoint_steps: then `request.model` is the run; its checkpoints are exported, once, to
            `exports` below `request.out`, which needs deepspeed.
    Raises: CheckpointError if there is no such checkpoint; ConfigError if the folder holds samples
        of a single job, or an export of another checkpoint.
    """
    scales = tuple(dict.fromkeys(cfg_scales)) or (request.cfg_scale,)
    if (checkpoint_steps or len(scales) > 1) and (request.out / SETTINGS_FILE).exists():
        raise ConfigError(
            f"--out {request.out}: holds samples of one job: choose another folder for several"
        )
    models = {request.out: request.model}
    if checkpoint_steps:
        models = _export_checkpoints(request.model, checkpoint_steps, request.out)
    return [
        replace(
            request,
            model=model,
            out=out if len(scales) == 1 else out / f"cfg_{scale}",
            cfg_scale=scale,
        )
        for out, model in models.items()
        for scale in scales
    ]


def _export_checkpoints(run: Path, steps: Sequence[int], out: Path) -> dict[Path, Path]:
    """Export the checkpoints that are not exported yet; return folder for samples -> export."""
    from promoe_ds.checkpoint.conversion import Request, convert

    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = {step_of(path): path for path in list_checkpoints(root)}
    if missing := [step for step in steps if step not in found]:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise CheckpointError(
            f"--checkpoint-steps {missing[0]}: {root} has no such checkpoint; there are: {there}"
        )
    exports = {}
    for step in steps:
        name, source = step_folder(step), found[step]
        exports[out / name] = export = out / "exports" / name
        if not (export / CONFIG_FILE).is_file():
            conversion = convert(source, Request(destination=export, to="single"))
            _LOG.info("%s", " ".join(filter(None, [f"exported {source}.", conversion.note])))
        elif read_export_config(export)[1].get("manifest") != manifest_checksum(source):
            raise ConfigError(
                f"--out {out}: {export} is not of {source}: remove it, or choose another folder"
            )
    return exports


def choose_labels(request: SampleRequest, config: RunConfig) -> np.ndarray:
    """Return every image's class, or its prompt's place, a function of its index: in turn, or
    random by (seed, index).
    """
    _check_subjects(request, config)
    is_text = config.model.condition == "text"
    every = range(len(request.prompts) if is_text else config.model.num_classes)
    subjects = request.classes or every
    count = request.num or len(subjects) * (1 if is_text else 10)
    if request.labels == "random":
        numbers = (generator(request.seed, "sample", 2, index) for index in range(count))
        places = [int(each.integers(len(subjects))) for each in numbers]
    else:
        places = [index % len(subjects) for index in range(count)]
    return np.array(subjects, dtype=np.int64)[places]


def _check_subjects(request: SampleRequest, config: RunConfig) -> None:
    """Refuse what the model is not conditioned on."""
    if config.model.condition == "text":
        if request.classes is not None:
            raise ConfigError(
                "--classes: this model is conditioned on text, it knows no classes: use --prompt or"
                " --prompts"
            )
        if not request.prompts:
            raise ConfigError(
                "--prompt: this model is conditioned on text: say what to draw by --prompt, or by"
                " --prompts, a file with one a line"
            )
        check_prompts(request.prompts, "--prompt")
        if request.negative_prompt is not None:
            check_prompts([request.negative_prompt], "--negative-prompt")
        return
    for name, value in (
        ("--prompt", request.prompts),
        ("--negative-prompt", request.negative_prompt),
        ("--text-encoder", request.text_encoder),
    ):
        if value not in (None, ()):
            raise ConfigError(
                f"{name}: this model is conditioned on classes, not on text: use --classes"
            )
    classes = request.classes or ()
    wrong = [label for label in classes if not 0 <= label < config.model.num_classes]
    if wrong:
        raise ConfigError(
            f"--classes {wrong[0]}: this model knows the classes 0 ..."
            f" {config.model.num_classes - 1}"
        )


def choose_size(request: SampleRequest, config: RunConfig) -> tuple[int, int]:
    """Return the height and width of the latents; warn of a size that the model never saw.

    Raises: ConfigError if the model has no patches for it.
    """
    model = config.model
    if request.size is None:
        return model.latent_size
    size, name = sides(request.size), size_name(request.size)
    if any(side % model.patch_size for side in size):
        raise ConfigError(
            f"--size {name}: both sides must be multiples of model.patch_size={model.patch_size}"
        )
    if size not in model.sizes:
        warn_once(
            "--size %s: the model was trained at %s (of latents): at another size images get worse",
            *(name, ", ".join(map(size_name, model.sizes))),
        )
    return size


def make_plan(request: SampleRequest, config: RunConfig) -> SamplingPlan:
    """Return how to sample: what the request states over the recipe's defaults.

    Raises: ConfigError if it does not fit the objective.
    """
    plan = plan_sampling(
        config,
        lambda field: f"--{field.replace('_', '-')}",
        steps=request.steps,
        solver=request.solver,
        cfg_scale=request.cfg_scale,
        cfg_interval=request.cfg_interval,
    )
    check_guided(plan.cfg_scale, "--negative-prompt", request.negative_prompt)
    return plan


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the lines of a file, each a prompt.

    Raises: ConfigError if it cannot be read, is not UTF-8, or holds none.
    """
    try:
        text = read_text(path)
    except DataError as error:
        raise ConfigError(f"--prompts {error}") from None
    if not text.strip():
        raise ConfigError(f"--prompts {path}: holds no prompt: write one a line")
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))


def check_prompts(prompts: Sequence[str], name: str) -> None:
    """Report the prompts that mean no text.

    Raises: ConfigError for one that is no text: bytes of the command line that are not UTF-8.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{name} {prompt!a}: is not UTF-8: give it in UTF-8") from None
    if blank := sum(not prompt.strip() for prompt in prompts):
        warn_once("%s: %d of %d blank: the null condition, no text", name, blank, len(prompts))


def load_conditions(
    request: SampleRequest, config: RunConfig, device: torch.device
) -> tuple[Conditions, TextIdentity | None]:
    """Return what makes conditions of labels, and which text encoder it takes, if any.

    Raises: DataError if none is named or can be loaded, or it is not the one of the training.
    """
    if config.model.condition == "class":
        null = config.model.null_label
        return lambda labels: (ClassCondition(torch.from_numpy(labels), null), None), None
    encoder = encoder_of(config, name=request.text_encoder, device=device)
    prompts, negative = request.prompts, None
    if request.negative_prompt is not None:
        negative = encoder.condition([request.negative_prompt])

    def encode(labels_B: np.ndarray) -> tuple[Condition, Condition | None]:
        """Encode the prompts of some images: all at once would fill the memory."""
        condition = encoder.condition([prompts[label] for label in labels_B])
        if negative is None:
            return condition, None
        return condition, negative.select(torch.zeros(len(labels_B), dtype=torch.int64))

    return encode, encoder.identity
