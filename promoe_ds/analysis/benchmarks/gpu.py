"""Everything that needs a GPU, in one command: parity, agreement of training, speed, memory, kernels.

Every function takes the device, so that unit tests run them, small, without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from promoe_ds.analysis.benchmarks.contenders import single_process, with_precision
from promoe_ds.analysis.benchmarks.layers import layer_contenders
from promoe_ds.analysis.benchmarks.parity import PRECISIONS, layer_comparisons, network_parity
from promoe_ds.analysis.benchmarks.step import for_timing, free_memory, in_session, step_call, without_experts
from promoe_ds.analysis.benchmarks.timing import Timing, interleave, machine_description
from promoe_ds.config import RunConfig, load_config, training_flops_per_image
from promoe_ds.config.devices import bf16_peak
from promoe_ds.errors import ConfigError

_T = TypeVar("_T")

#: Recipes and images of a pass, halved until they fit.
STEPS = {"promoe_b": 128, "promoe_l": 64, "promoe_xl": 64}
_TOP_KERNELS = 15
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """One recipe's training step on this device; mfu: of the device's bf16 peak, in FP8 as well."""

    images: int
    milliseconds: float
    mfu: float | None
    memory_gb: float

    def line(self, name: str) -> str:
        """Return the figures of one step for a reader."""
        mfu = "-" if self.mfu is None else f"{100 * self.mfu:.1f}"
        return f"  {name:40}{self.images:>8}{self.milliseconds:>10.1f}{mfu:>8}{self.memory_gb:>8.1f}"


#: How a part's results are written, one line each.
_LINES: dict[str, Callable[[str, Any], str]] = {
    "parity": lambda name, error: f"  {name:40}{error:10.2e}",
    "losses": lambda name, loss: f"  {name:40}{loss:10.5f}",
    "steps": lambda name, step: step.line(name),
    "layer": lambda name, timing: f"  {name:40}{timing.wall_ms:>10.2f}{timing.wall_ratio:>8.3f}",
    "kernels": lambda name, ms: f"  {name[:60]:62}{ms:8.2f}",
}
_HEADINGS = {
    "parity": "relative error against float64", "losses": "mean loss of the last training steps",
    "steps": f"{'training step':42}{'images':>8}{'ms':>10}{'MFU %':>8}{'GB':>8}",
    "layer": f"{'one MoE layer, forward and backward':42}{'ms':>10}{'ratio':>8}", "kernels": "kernels of a step, ms",
}


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """What the self-test found.

    parity: largest relative error against float64 by what was compared; losses: mean training loss by precision; steps: by
    recipe and precision; layer: one MoE layer of the largest recipe; kernels: milliseconds of a step by kernel;
    not_available: what this installation or device does not have; failed: parts that an error ended, memory included.
    """

    suite: str = "gpu"
    parity: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    steps: dict[str, StepSpeed] = field(default_factory=dict)
    layer: dict[str, Timing] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return the report for a reader."""
        lines = [f"gpu: {self.machine}, {self.seconds:.0f} s"]
        for part, heading in _HEADINGS.items():
            lines += ["", heading, *(_LINES[part](name, value) for name, value in getattr(self, part).items())]
        lines += [f"not available: {name}: {reason}" for name, reason in self.not_available.items()]
        return lines + [f"failed: {name}: {reason}" for name, reason in self.failed.items()]


class _Parts:
    """Runs parts of the self-test one after the other; one that fails is noted and costs no other."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.results: dict[str, dict[str, Any]] = {part: {} for part in (*_LINES, "not_available", "failed")}
        self._tell, self._began = tell, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def run(self, part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Add what `work` returns, by name, to the results of a part, and tell it."""
        found = self._guarded(name, work)
        if found is not None:
            self.results[part] |= found
            self._tell(f"{self.seconds:5.0f} s  {part}: {name}")
            for key, value in found.items():
                self._tell(_LINES[part](key, value))

    def prepare(self, name: str, build: Callable[[], tuple[dict[str, Any], dict[str, str]]]) -> dict[str, Any]:
        """Return the contenders that were built, and note why others are missing."""
        found, missing = self._guarded(name, build) or ({}, {})
        self.note("not_available", missing)
        return found

    def try_out(self, name: str, call: Callable[[], Any]) -> bool:
        """Whether a contender runs."""
        return self._guarded(name, lambda: (call(),)) is not None

    def _guarded(self, name: str, work: Callable[[], _T]) -> _T | None:
        free_memory()
        try:
            return work()
        except (ConfigError, ImportError) as error:
            self.note("not_available", {name: str(error)})
        except Exception as error:  # whatever it is: minutes of other measurements must not be lost with it
            first_line = next(iter(str(error).splitlines()), "")
            self.note("failed", {name: f"{type(error).__name__}: {first_line}"})
        return None

    def note(self, kind: str, reasons: dict[str, str]) -> None:
        """Add reasons why something is missing, and tell them."""
        self.results[kind] |= reasons
        for name, reason in reasons.items():
            self._tell(f"{self.seconds:5.0f} s  {kind.replace('_', ' ')}: {name}: {reason}")


def benchmark_gpu(tell: Callable[[str], None] = lambda line: None) -> GpuReport:
    """Run the self-test on the first CUDA device, in under 8 minutes.

    Args:
        tell: gets a line for everything that was found, as soon as it was.
    Raises: ConfigError without a device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("the gpu suite needs a CUDA device, this process sees none: run it on a GPU machine; the other suites "
                          "run on CPUs")
    with single_process() as device:
        return report(device, steps=STEPS, layer_recipe="promoe_xl", parity_recipe="promoe_s", layer_images=64, training_steps=60,
                      tell=tell)


def report(device: torch.device, *, steps: dict[str, int], layer_recipe: str | RunConfig, parity_recipe: str | RunConfig,
           layer_images: int, training_steps: int, tell: Callable[[str], None] = lambda line: None) -> GpuReport:
    """Run all parts on `device`, in a process group of one; a part that fails is noted, and the others run."""
    parts = _Parts(tell)
    small, large = _config(parity_recipe), _config(layer_recipe)
    half = torch.bfloat16
    for name, compare in parts.prepare("layers", lambda: layer_comparisons(small, device, half)).items():
        parts.run("parity", name, lambda name=name, compare=compare: {name: compare()})
    for precision in PRECISIONS:
        parts.run("parity", f"network, {precision}", lambda precision=precision: {
            f"network, {precision}": network_parity(with_precision(small, precision), precision, device)})
        parts.run("losses", f"training, {precision}", lambda precision=precision: {
            precision: mean_loss(with_precision(small, precision), precision, steps=training_steps)})
    for recipe, images in steps.items():
        for precision in ("bf16", "fp8"):
            parts.run("steps", f"{recipe}, {precision}", lambda recipe=recipe, images=images, precision=precision: {
                f"{recipe}, {precision}": step_speed(with_precision(_config(recipe), precision), images, device)})
        parts.run("steps", f"{recipe} without experts, bf16", lambda recipe=recipe, images=images: {
            f"{recipe} without experts, bf16": step_speed(without_experts(_config(recipe)), images, device)})
    contenders = parts.prepare("contenders", lambda: layer_contenders(large, layer_images, device, half))
    contenders = {name: call for name, call in contenders.items() if parts.try_out(f"layer, {name}", call)}
    parts.run("layer", "one MoE layer", lambda: interleave(contenders, rounds=20))
    profiled = list(steps)[-1] if steps else None
    fitted = parts.results["steps"].get(f"{profiled}, bf16")
    parts.run("kernels", "kernels", lambda: kernel_times(
        _config(profiled) if profiled else small, fitted.images if fitted else layer_images, device))
    return GpuReport(**parts.results, seconds=parts.seconds)


def mean_loss(config: RunConfig, precision: str, *, steps: int) -> float:
    """Train `steps` steps on the same synthetic samples and return the mean loss of the last third."""
    losses = in_session(for_timing(config, micro_batch=8), bf16=precision != "fp32",
                        body=lambda session: [float(step_call(session)().terms["diffusion"]) for _ in range(steps)])
    return sum(losses[-(steps // 3 or 1):]) / (steps // 3 or 1)


def step_speed(config: RunConfig, images: int, device: torch.device, *, rounds: int = 10) -> StepSpeed:
    """Time whole steps of one pass; images are halved until they fit."""
    while True:
        try:
            return _step_speed(config, images, device, rounds)
        except torch.cuda.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2


def _step_speed(config: RunConfig, images: int, device: torch.device, rounds: int) -> StepSpeed:
    cuda = device.type == "cuda"

    def body(session: Any) -> Timing:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        return interleave({"step": step_call(session)}, rounds=rounds, warmup=3)["step"]

    timing = in_session(for_timing(config, micro_batch=images), body, bf16=cuda)
    peak = bf16_peak(torch.cuda.get_device_name(device)) if cuda else None
    rate = images * training_flops_per_image(config) / (timing.wall_ms / 1e3)
    return StepSpeed(images=images, milliseconds=timing.wall_ms, mfu=rate / peak if peak else None,
                     memory_gb=torch.cuda.max_memory_allocated(device) / _GIGA if cuda else 0.0)


def kernel_times(config: RunConfig, images: int, device: torch.device) -> dict[str, float]:
    """Profile one step and return the milliseconds of the kernels that take longest."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU

    def body(session: Any) -> Any:
        step_call(session)()
        with torch.profiler.profile(activities=[activity]) as profile:
            step_call(session)()
            if cuda:
                torch.cuda.synchronize(device)
        return profile

    averages = in_session(for_timing(config, micro_batch=images), body, bf16=cuda).key_averages()
    field_ = "self_device_time_total" if cuda else "self_cpu_time_total"
    microseconds = {event.key: getattr(event, field_) for event in averages}
    return {key: microseconds[key] / 1e3 for key in sorted(microseconds, key=microseconds.get, reverse=True)[:_TOP_KERNELS]}


def _config(recipe: str | RunConfig) -> RunConfig:
    return recipe if isinstance(recipe, RunConfig) else load_config(recipe)
