"""What the GPU self-test should find: predictions by the planner's trace, goals that no trace
predicts, and both beside what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.candidates import for_timing, without_experts
from benchmarks.layers import active_width, conditional, layer_call, pass_of
from benchmarks.timing import Result
from promoe_ds.backends.devices import DEVICES, Device
from promoe_ds.config import RunConfig, change_config, load_config, plan_batches, resolve_deepspeed
from promoe_ds.kernels.choice import as_on_gpu
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe.experts import FeedForward
from promoe_ds.planning.cluster import Cluster, layout_of
from promoe_ds.planning.planner import StepPlan, plan_step
from promoe_ds.planning.shapes import fake_world, trace_sampling
from promoe_ds.planning.trace import ShapeTrace
from promoe_ds.planning.work import Efficiency
from promoe_ds.torch_private import fake_tensors

#: Recipes and images of a pass, halved until they fit.
STEPS = {"promoe_b": 128, "promoe_l": 64, "promoe_xl": 64}
#: Variants of a step: by name, what changes the config, and whether its weights are bf16.
VARIANTS: dict[str, tuple[Callable[[RunConfig], RunConfig], bool]] = {
    "bf16": (lambda config: config, True),
    "without experts": (without_experts, True),
    "plain operations": (lambda c: change_config(c, parallel={"kernels": "eager"}), True),
    "autocast": (lambda c: change_config(c, precision={"compute": "bf16_autocast"}), False),
    "compiled": (lambda c: change_config(c, parallel={"compile": True}), True),
    "fp8": (lambda c: change_config(c, precision={"compute": "fp8"}), True),
}
#: Variants of the last recipe alone, and those that shapes cannot follow.
OF_THE_LAST, UNTRACED = ("plain operations", "autocast", "compiled"), ("compiled", "fp8")
#: What is wanted of one H100: at most, or (True) at least. Reached where the prediction says so.
GOALS = {
    "promoe_xl, bf16: ms": (120.0, False),
    "promoe_xl, bf16: MFU %": (40.0, True),
    "promoe_xl, bf16: kernels": (3000.0, False),
    "promoe_xl, bf16: host ms": (55.0, False),
    "promoe_xl: bf16 / fp8 ms": (1.15, True),
    "layer: moe / dense": (1 / 0.85, False),
    "layer: per_expert_loop / moe": (2.0, True),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure: what the trace predicts, what is wanted, what was measured; None if nothing."""

    predicted: float | None = None
    goal: float | None = None
    at_least: bool = False
    measured: float | None = None

    def reaches(self, value: float | None) -> bool:
        """Whether a value reaches the goal, where there is one."""
        if value is None or self.goal is None:
            return False
        return value >= self.goal if self.at_least else value <= self.goal

    def goal_text(self) -> str:
        """Return the goal and whether it is reached, as far as anything is known."""
        if self.goal is None:
            return "-"
        wanted = f"{'≥' if self.at_least else '≤'} {self.goal:,.4g}"
        known = self.predicted if self.measured is None else self.measured
        if known is None:
            return f"{wanted}, a goal"
        by = "by prediction" if self.measured is None else "as measured"
        return f"{wanted}, {'' if self.reaches(known) else 'not '}reached {by}"


def variants_of(recipe: str) -> list[str]:
    """Return the variants in which a recipe's step is run."""
    is_last = recipe == list(STEPS)[-1]
    return [name for name in VARIANTS if is_last or name not in OF_THE_LAST]


def predictions(
    steps: Mapping[str, int], layer_config: RunConfig, images: int, device: str
) -> dict[str, float]:
    """Predict figures of one device by name; call in a process that is in no group.

    Args:
        images: of the layer's and of a sampling step's pass.
    """
    found: dict[str, float] = {}
    for recipe, count in steps.items():
        for name in variants_of(recipe):
            if name not in UNTRACED:
                plan = _plan(load_config(recipe), name, count, DEVICES[device])
                found |= {
                    f"{recipe}, {name}: ms": 1e3 * plan.total_seconds,
                    f"{recipe}, {name}: MFU %": 100 * plan.mfu,
                    f"{recipe}, {name}: GB": plan.total_memory / 1e9,
                    f"{recipe}, {name}: kernels": plan.kernels,
                }
    layer = {
        name: 1e3 * _seconds(_layer_trace(layer_config, images, name), DEVICES[device])
        for name in ("dense", "moe")
    }
    found |= {f"layer, {name}: ms": value for name, value in layer.items()}
    found["layer: moe / dense"] = layer["moe"] / layer["dense"]
    # Guidance computes each image with and without its label.
    evaluation = _seconds(trace_sampling(layer_config, 2 * images), DEVICES[device])
    found[f"{layer_config.name}, sampling: ms a step"] = 1e3 * evaluation
    return found


def _plan(config: RunConfig, variant: str, images: int, device: Device) -> StepPlan:
    change, bf16 = VARIANTS[variant]
    config = for_timing(change(config), micro_batch=images)
    batches = plan_batches(config, 1)
    values = {"zero_optimization": {"stage": 2, "overlap_comm": bf16}, "bf16": {"enabled": bf16}}
    deepspeed = resolve_deepspeed(values, config, batches, source="benchmark")
    cluster = Cluster(nodes=1, gpus_per_node=1, device=device, network_bandwidth=1.0)
    with fake_world(1):
        return plan_step(config, layout_of(batches, deepspeed), cluster)


def _layer_trace(config: RunConfig, images: int, name: str) -> ShapeTrace:
    """Trace a pass of one layer as `layers.layer_candidates` makes it, in bf16."""
    model = config.model
    partition = conditional(images, config)
    with fake_tensors() as mode, as_on_gpu():
        shape = (images, model.tokens_per_image, model.hidden_size)
        inputs = torch.empty(shape, dtype=torch.bfloat16)
        partition = replace(
            partition,
            **{
                field: mode.from_tensor(value)
                for field, value in vars(partition).items()
                if isinstance(value, torch.Tensor)
            },
        )
        if name == "dense":
            module = FeedForward(model.hidden_size, active_width(config)).bfloat16()
            call = lambda x: (module(x), [])  # noqa: E731
        else:
            module = build_moe_layer(config).bfloat16().train()
            call = layer_call(module, partition)
        trace = ShapeTrace(known=module.parameters())
        with trace:
            pass_of(module, call, inputs, torch.empty_like(inputs))
    return trace


def _seconds(trace: ShapeTrace, device: Device) -> float:
    calls = (work for part in trace.work.values() for work in part)
    return sum(work.seconds(device, Efficiency()) for work in calls)


def claims(predicted: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, Claim]:
    """Set what the self-test found beside predictions and goals, by name."""
    measured = _figures(found)
    names = dict.fromkeys([*predicted, *GOALS, *measured])
    return {
        name: Claim(
            predicted=predicted.get(name),
            goal=GOALS[name][0] if name in GOALS else None,
            at_least=name in GOALS and GOALS[name][1],
            measured=measured.get(name),
        )
        for name in names
    }


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the self-test's figures by the names of the predictions."""
    figures: dict[str, float] = {}
    for name, step in found.get("steps", {}).items():
        figures |= {f"{name}: ms": step.milliseconds, f"{name}: GB": step.memory_gb}
        if step.mfu is not None:
            figures[f"{name}: MFU %"] = 100 * step.mfu
    figures |= found.get("counts", {})
    layer = {name: timing.wall_ms for name, timing in found.get("layer", {}).items()}
    figures |= {f"layer, {name}: ms": value for name, value in layer.items()}
    for above, below in (("moe", "dense"), ("per_expert_loop", "moe")):
        if {above, below} <= layer.keys():
            figures[f"layer: {above} / {below}"] = layer[above] / layer[below]
    last = list(STEPS)[-1]
    pair = [found.get("steps", {}).get(f"{last}, {name}") for name in ("bf16", "fp8")]
    if all(pair) and pair[0].images == pair[1].images:
        figures[f"{last}: bf16 / fp8 ms"] = pair[0].milliseconds / pair[1].milliseconds
    return figures


def table(every: Mapping[str, Claim]) -> list[str]:
    """Return the claims as a Markdown table."""
    lines = ["| | predicted by trace | measured | measured / predicted | goal |"]
    lines += ["|---|---|---|---|---|"]
    for name, claim in every.items():
        both = claim.measured is not None and claim.predicted
        ratio = f"{claim.measured / claim.predicted:.2f}" if both else "-"
        cells = (name, _text(claim.predicted), _text(claim.measured), ratio, claim.goal_text())
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def benchmark_predictions(device: str) -> Result:
    """Predict everything that the gpu suite measures, without a device."""
    predicted = predictions(STEPS, load_config("promoe_xl"), 64, device)
    return Result(
        suite="gpu-predictions",
        settings={"device": device, "steps": STEPS},
        figures={"predicted": predicted},
        text=[
            "predicted from shares of the maker's peaks, not measured",
            *table(claims(predicted, {})),
        ],
    )
