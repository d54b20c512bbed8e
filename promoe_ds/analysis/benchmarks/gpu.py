"""Everything that needs a GPU, in one command: parity, agreement of training, speed, memory, kernels.

Every function takes the device, so that unit tests run them, small, without one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from promoe_ds.analysis.benchmarks.contenders import single_process, with_precision
from promoe_ds.analysis.benchmarks.layers import layer_contenders
from promoe_ds.analysis.benchmarks.parity import PRECISIONS, layer_parity, network_parity
from promoe_ds.analysis.benchmarks.step import for_timing, open_session, step_call, without_experts
from promoe_ds.analysis.benchmarks.timing import Timing, interleave, machine_description
from promoe_ds.config import RunConfig, load_config, training_flops_per_image
from promoe_ds.config.devices import bf16_peak
from promoe_ds.errors import ConfigError, PromoeError

#: Recipes and images of a pass, halved until they fit.
STEPS = {"promoe_b": 128, "promoe_l": 64, "promoe_xl": 64}
_TOP_KERNELS = 15
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """One recipe's training step on this device."""

    images: int
    milliseconds: float
    mfu: float | None
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """What the self-test found.

    parity: largest relative error against float64 by what was compared; losses: mean training loss by precision; steps: by
    recipe and precision; layer: one MoE layer of the largest recipe; kernels: milliseconds of a step by kernel.
    """

    suite: str = "gpu"
    parity: dict[str, float]
    losses: dict[str, float]
    steps: dict[str, StepSpeed]
    layer: dict[str, Timing]
    kernels: dict[str, float]
    not_available: dict[str, str]
    seconds: float
    machine: dict[str, object] = field(default_factory=machine_description)

    def lines(self) -> list[str]:
        """Return the report for a reader."""
        lines = [f"gpu: {self.machine}, {self.seconds:.0f} s", "", "relative error against float64"]
        lines += [f"  {name:40}{error:10.2e}" for name, error in self.parity.items()]
        lines += ["", "mean loss of the last training steps"] + [f"  {name:40}{loss:10.5f}" for name, loss in self.losses.items()]
        lines += ["", f"{'training step':42}{'images':>8}{'ms':>10}{'MFU %':>8}{'GB':>8}"]
        for name, step in self.steps.items():
            mfu = "-" if step.mfu is None else f"{100 * step.mfu:.1f}"
            lines.append(f"  {name:40}{step.images:>8}{step.milliseconds:>10.1f}{mfu:>8}{step.memory_gb:>8.1f}")
        lines += ["", f"{'one MoE layer, forward and backward':42}{'ms':>10}{'ratio':>8}"]
        lines += [f"  {name:40}{timing.wall_ms:>10.2f}{timing.wall_ratio:>8.3f}" for name, timing in self.layer.items()]
        lines += ["", "kernels of a step, ms"] + [f"  {name[:60]:62}{ms:8.2f}" for name, ms in self.kernels.items()]
        return lines + [f"not available: {name}: {reason}" for name, reason in self.not_available.items()]


def benchmark_gpu() -> GpuReport:
    """Run the self-test on the first CUDA device, in under 8 minutes.

    Raises: ConfigError without one.
    """
    if not torch.cuda.is_available():
        raise ConfigError("the gpu suite needs a CUDA device, this process sees none: run it on a GPU machine; the other suites "
                          "run on CPUs")
    with single_process() as device:
        return report(device, steps=STEPS, layer_recipe="promoe_xl", parity_recipe="promoe_s", layer_images=64, training_steps=60)


def report(device: torch.device, *, steps: dict[str, int], layer_recipe: str | RunConfig, parity_recipe: str | RunConfig,
           layer_images: int, training_steps: int) -> GpuReport:
    """Run all parts on `device`, in a process group of one."""
    began = time.perf_counter()
    missing: dict[str, str] = {}
    small, large = _config(parity_recipe), _config(layer_recipe)
    half = torch.bfloat16
    parity, absent = layer_parity(small, device, half)
    missing |= absent
    losses, speeds = {}, {}
    for precision in PRECISIONS:
        try:
            chosen = with_precision(small, precision)
            parity[f"network, {precision}"] = network_parity(chosen, precision, device)
            losses[precision] = mean_loss(chosen, precision, steps=training_steps)
        except (PromoeError, ImportError) as error:
            missing[precision] = str(error)
    for recipe, images in steps.items():
        for precision in ("bf16", "fp8"):
            if precision not in missing:
                speeds[f"{recipe}, {precision}"] = step_speed(with_precision(_config(recipe), precision), images, device)
        speeds[f"{recipe} without experts, bf16"] = step_speed(without_experts(_config(recipe)), images, device)
    contenders, absent = layer_contenders(large, layer_images, device, half)
    layer = interleave(contenders, rounds=20)
    kernels = kernel_times(small if not steps else _config(list(steps)[-1]), layer_images, device)
    return GpuReport(parity=parity, losses=losses, steps=speeds, layer=layer, kernels=kernels, not_available=missing | absent,
                     seconds=time.perf_counter() - began)


def mean_loss(config: RunConfig, precision: str, *, steps: int) -> float:
    """Train `steps` steps on the same synthetic samples and return the mean loss of the last third."""
    with open_session(for_timing(config, micro_batch=8), bf16=precision != "fp32") as session:
        losses = [float(step_call(session)().terms["diffusion"]) for _ in range(steps)]
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
    with open_session(for_timing(config, micro_batch=images), bf16=cuda) as session:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        timing = interleave({"step": step_call(session)}, rounds=rounds, warmup=3)["step"]
    peak = bf16_peak(torch.cuda.get_device_name(device)) if cuda else None
    rate = images * training_flops_per_image(config) / (timing.wall_ms / 1e3)
    return StepSpeed(images=images, milliseconds=timing.wall_ms, mfu=rate / peak if peak else None,
                     memory_gb=torch.cuda.max_memory_allocated(device) / _GIGA if cuda else 0.0)


def kernel_times(config: RunConfig, images: int, device: torch.device) -> dict[str, float]:
    """Profile one step and return the milliseconds of the kernels that take longest."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with open_session(for_timing(config, micro_batch=images), bf16=cuda) as session:
        step_call(session)()
        with torch.profiler.profile(activities=[activity]) as profile:
            step_call(session)()
            if cuda:
                torch.cuda.synchronize(device)
    field_ = "self_device_time_total" if cuda else "self_cpu_time_total"
    microseconds = {event.key: getattr(event, field_) for event in profile.key_averages()}
    return {key: microseconds[key] / 1e3 for key in sorted(microseconds, key=microseconds.get, reverse=True)[:_TOP_KERNELS]}


def _config(recipe: str | RunConfig) -> RunConfig:
    return recipe if isinstance(recipe, RunConfig) else load_config(recipe)
