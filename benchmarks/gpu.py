"""Everything that needs a GPU, in one command: parity, agreement of training, speed, memory,
kernels.

Every function takes the device, so that unit tests run them, small, without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from benchmarks.candidates import for_timing, free_memory, with_precision, with_trainer
from benchmarks.claims import STEPS, VARIANTS, claims, predictions, table, variants_of
from benchmarks.layers import layer_candidates
from benchmarks.parity import PRECISIONS, layer_comparisons, network_parity
from benchmarks.processes import in_fresh_process, single_process
from benchmarks.timing import Result, interleave, wall_clock
from promoe_ds.backends.devices import find_device
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, load_config, training_flops_per_image
from promoe_ds.diffusion.sampler import SamplingPlan
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.sampling import LatentSampler, sampling_dtype
from promoe_ds.model import build_model
from promoe_ds.training.trainer import Trainer

_T = TypeVar("_T")

_TOP_KERNELS = 15
_SAMPLING_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """One recipe's training step; mfu: of the device's bf16 peak, in FP8 as well."""

    images: int
    milliseconds: float
    mfu: float | None
    memory_gb: float


#: By part, the heading and one line of its results.
_PARTS: dict[str, tuple[str, Callable[[str, Any], str]]] = {
    "parity": ("relative error against float64", lambda name, error: f"  {name:40}{error:10.2e}"),
    "losses": (
        "mean loss of the last training steps",
        lambda name, loss: f"  {name:40}{loss:10.5f}",
    ),
    "steps": (
        f"{'training step':42}{'images':>8}{'ms':>10}{'MFU %':>8}{'GB':>8}",
        lambda name, step: (
            f"  {name:40}{step.images:>8}{step.milliseconds:>10.1f}"
            f"{'-' if step.mfu is None else f'{100 * step.mfu:.1f}':>8}{step.memory_gb:>8.1f}"
        ),
    ),
    "counts": ("other figures", lambda name, value: f"  {name:40}{value:>10.1f}"),
    "layer": (
        f"{'one MoE layer, forward and backward':42}{'ms':>10}{'ratio':>8}",
        lambda name, timing: f"  {name:40}{timing.wall_ms:>10.2f}{timing.wall_ratio:>8.3f}",
    ),
    "kernels": ("kernels of a step, ms", lambda name, ms: f"  {name[:60]:62}{ms:8.2f}"),
    "not_available": ("", lambda name, reason: f"not available: {name}: {reason}"),
    "failed": ("", lambda name, reason: f"failed: {name}: {reason}"),
}


class SelfTest:
    """Runs parts one after the other; one that fails is noted and costs no other.

    found: by part, results by name. parity: largest relative error against float64 by what was
    compared; losses: mean training loss by precision; steps: by recipe and precision; layer: one
    MoE layer of the largest recipe; kernels: milliseconds of a step by kernel; not_available: what
    this installation or device does not have; failed: parts that an error ended, memory included.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        """Hand a line for everything that is found to `report`, as soon as it is."""
        self.found: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        self.predicted: dict[str, float] = {}
        self._report, self._began = report, wall_clock()

    def add(self, part: str, results: dict[str, Any]) -> None:
        """Add results to a part."""
        self.found[part] |= results
        for name, value in results.items():
            self._report(f"{wall_clock() - self._began:5.0f} s  {_PARTS[part][1](name, value)}")

    def attempt(self, name: str, work: Callable[[], _T], default: _T | None = None) -> _T | None:
        """Return work(), or note why it could not be done and return the default."""
        free_memory()
        try:
            return work()
        except (ConfigError, ImportError) as error:
            self.add("not_available", {name: str(error)})
        except Exception as error:  # whatever it is: minutes of other measurements must not be lost
            first_line = next(iter(str(error).splitlines()), "")
            self.add("failed", {name: f"{type(error).__name__}: {first_line}"})
        return default

    def measure(self, part: str, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Add the result of work(*arguments) to a part."""
        if (value := self.attempt(name, lambda: work(*arguments))) is not None:
            self.add(part, {name: value})

    def result(self) -> Result:
        """Return all that was found."""
        text = []
        for part, (heading, line) in _PARTS.items():
            text += ["", heading] * bool(heading)
            text += [line(name, value) for name, value in self.found[part].items()]
        plain = {
            part: {
                name: asdict(value) if part in ("steps", "layer") else value
                for name, value in values.items()
            }
            for part, values in self.found.items()
        }
        every = claims(self.predicted, self.found)
        return Result(
            suite="gpu",
            settings={"steps": STEPS},
            text=[*text, "", *table(every)],
            figures={
                **plain,
                "claims": {name: asdict(claim) for name, claim in every.items()},
                "seconds": wall_clock() - self._began,
            },
        )


def benchmark_gpu(report: Callable[[str], None] = lambda line: None) -> Result:
    """Run the self-test on the first CUDA device, in under 8 minutes.

    Args:
        report: gets a line for everything that was found, as soon as it was.
    Raises: ConfigError without a device.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "the gpu suite needs a CUDA device, this process sees none: run it on a GPU "
            "machine; the other suites run on CPUs"
        )
    largest, images = load_config(list(STEPS)[-1]), 64
    known = find_device(torch.cuda.get_device_name())
    # In a process of its own: planning is for processes without a device.
    predicted = in_fresh_process(predictions, STEPS, largest, images, known.name) if known else {}
    with single_process() as device:
        test = self_test(
            device,
            steps=STEPS,
            layer_config=largest,
            parity_config=load_config("promoe_s"),
            layer_images=images,
            training_steps=60,
            report=report,
        )
    test.predicted = predicted
    return test.result()


def self_test(
    device: torch.device,
    *,
    steps: dict[str, int],
    layer_config: RunConfig,
    parity_config: RunConfig,
    layer_images: int,
    training_steps: int,
    report: Callable[[str], None] = lambda line: None,
) -> SelfTest:
    """Run all parts on `device`, in a process group of one."""
    test, half, small = SelfTest(report), torch.bfloat16, parity_config
    comparisons, missing = test.attempt(
        "layers", lambda: layer_comparisons(small, device, half), ({}, {})
    )
    test.add("not_available", missing)
    for name, compare in comparisons.items():
        test.measure("parity", name, compare)
    for precision in PRECISIONS:
        test.measure(
            "parity",
            f"network, {precision}",
            lambda p=precision: network_parity(with_precision(small, p), p, device),
        )
        test.measure(
            "losses",
            precision,
            lambda p=precision: mean_loss(with_precision(small, p), p, training_steps),
        )
    for recipe, images in steps.items():
        for variant in variants_of(recipe):
            name, given = f"{recipe}, {variant}", (recipe, variant, images, device)
            test.measure("steps", name, step_speed, *given)
    _time_layers(test, layer_config, layer_images, device)
    fitted = test.found["steps"].get(f"{layer_config.name}, bf16")
    _count(test, layer_config, fitted.images if fitted else layer_images, device)
    return test


def _count(test: SelfTest, config: RunConfig, images: int, device: torch.device) -> None:
    """Profile a step; time what the host does of it, and a step of sampling."""
    found = test.attempt("kernels", lambda: kernel_times(config, images, device))
    if found is not None:
        test.add("kernels", found[0])
        test.add("counts", {f"{config.name}, bf16: kernels": found[1]})
    for name, work in (
        # One image leaves the device idle: what remains is the host's time.
        (f"{config.name}, bf16: host ms", lambda: timed_step(config, 1, device).milliseconds),
        (f"{config.name}, sampling: ms a step", lambda: sampling_step(config, images, device)),
    ):
        test.measure("counts", name, work)


def sampling_step(config: RunConfig, images: int, device: torch.device) -> float:
    """Return the milliseconds of a solver's step under guidance, in the device's usual dtype."""
    network = build_model(config).to(device, sampling_dtype(device)).eval()
    plan = SamplingPlan.of(config, steps=_SAMPLING_STEPS, cfg_scale=1.5, solver="euler")
    sampler = LatentSampler(network, config, plan, seed=0, device=device)
    labels = torch.arange(images) % config.model.num_classes
    condition = ClassCondition(labels, config.model.null_label)
    with torch.no_grad():
        timing = interleave({"": lambda: sampler.sample(range(images), condition)}, rounds=3)
    return timing[""].wall_ms / _SAMPLING_STEPS


def _time_layers(test: SelfTest, config: RunConfig, images: int, device: torch.device) -> None:
    """Time the layers that work here, in turn."""
    candidates, missing = test.attempt(
        "candidates", lambda: layer_candidates(config, images, device, torch.bfloat16), ({}, {})
    )
    test.add("not_available", missing)
    ready = {
        name: call
        for name, call in candidates.items()
        if test.attempt(f"layer, {name}", lambda call=call: (call(),))
    }
    test.add("layer", test.attempt("layer", lambda: interleave(ready, rounds=20), {}))


def mean_loss(config: RunConfig, precision: str, steps: int) -> float:
    """Train `steps` steps on the same synthetic samples; return the mean loss of the last third."""
    losses = with_trainer(
        for_timing(config, micro_batch=8),
        bf16=precision != "fp32",
        body=lambda trainer: [float(trainer.train_step().terms["diffusion"]) for _ in range(steps)],
    )
    last = losses[-(steps // 3 or 1) :]
    return sum(last) / len(last)


def step_speed(recipe: str, variant: str, images: int, device: torch.device) -> StepSpeed:
    """Time whole steps of one pass; images are halved until they fit."""
    change, bf16 = VARIANTS[variant]
    config = change(load_config(recipe))
    while True:
        try:
            return timed_step(config, images, device, bf16=bf16)
        except torch.cuda.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2


def timed_step(
    config: RunConfig, images: int, device: torch.device, *, bf16: bool = True
) -> StepSpeed:
    """Time steps of one pass of `images` images; bf16: of the weights, on a GPU."""
    cuda = device.type == "cuda"

    def body(trainer: Trainer) -> float:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        return interleave({"step": trainer.train_step}, rounds=10, warmup=3)["step"].wall_ms

    milliseconds = with_trainer(for_timing(config, micro_batch=images), body, bf16=bf16 and cuda)
    rate = images * training_flops_per_image(config) / (milliseconds / 1e3)
    known = find_device(torch.cuda.get_device_name(device)) if cuda else None
    return StepSpeed(
        images=images,
        milliseconds=milliseconds,
        mfu=rate / known.flops["bf16"] if known else None,
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if cuda else 0.0,
    )


def kernel_times(
    config: RunConfig, images: int, device: torch.device
) -> tuple[dict[str, float], int]:
    """Profile one step; return the milliseconds of the kernels that take longest, and how many
    kernels ran.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"

    def profiled(trainer: Trainer) -> Any:
        trainer.train_step()
        with torch.profiler.profile(
            activities=[getattr(torch.profiler.ProfilerActivity, kind.upper())]
        ) as profile:
            trainer.train_step()
            wall_clock()  # waits for the device
        return profile.key_averages()

    averages = with_trainer(for_timing(config, micro_batch=images), profiled, bf16=kind == "cuda")
    field = f"self_{'device' if kind == 'cuda' else 'cpu'}_time_total"
    longest = sorted(averages, key=lambda event: getattr(event, field), reverse=True)[:_TOP_KERNELS]
    times = {event.key: getattr(event, field) / 1e3 for event in longest}
    ran = [event for event in averages if getattr(event, field) > 0]
    return times, sum(
        event.count for event in ran if not event.key.startswith(("Memcpy", "Memset"))
    )
