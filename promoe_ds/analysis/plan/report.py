"""A plan as text for a terminal."""

from __future__ import annotations

from dataclasses import asdict

from promoe_ds.analysis.plan.planner import StepPlan
from promoe_ds.analysis.plan.search import Choice

_GIGA = 1e9


def plan_lines(plan: StepPlan) -> list[str]:
    """Return the table of one plan."""
    config, layout, cluster, memory = plan.config, plan.layout, plan.cluster, plan.memory
    count, parallel, cut = plan.parameters, plan.config.parallel, f"accumulation {plan.layout.accumulation}"
    lines = [
        f"{config.name}: {count.total:,} parameters, {count.activated:,} active for a token, "
        f"{plan.parameters_per_rank:,} on a rank",
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}: dp {layout.world_size}, ep {parallel.ep_size}, "
        f"micro-batch {layout.micro_batch}, {cut}, checkpointing {parallel.activation_checkpointing}, ZeRO {layout.zero_stage}, "
        f"{layout.precision}",
        "", f"memory of a rank, GB (fullest in the {memory.phase}{' pass' if memory.phase == 'backward' else ''})"]
    lines += [f"  {kind:14}{value / _GIGA:10.2f}" for kind, value in asdict(memory).items() if kind not in ("phase", "host")]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [f"  {'total':14}{memory.total / _GIGA:10.2f}   of {cluster.device.memory / _GIGA:.0f}: {verdict}"]
    lines += [f"  {'in host memory':14}{memory.host / _GIGA:10.2f}"] if memory.host else []
    lines += ["",
              f"{'sent by a rank in a step, MB':32}{'in the node':>14}{'to other nodes':>16}"]
    lines += [f"  {name:30}{link.inside_node / 1e6:14.2f}{link.between_nodes / 1e6:16.2f}" for name, link in plan.traffic.items()]
    lines += ["", f"work of a step: {plan.flops / 1e12:,.1f} TFLOP (attention and active experts)",
              "predicted time of a step, ms (from assumed shares of peak, nothing measured)"]
    lines += [f"  {name:14}{1e3 * value:10.2f}" for name, value in asdict(plan.time).items()]
    lines += [f"  {'total':14}{1e3 * plan.time.total:10.2f}   {plan.images_per_second:,.0f} images/s, MFU {100 * plan.mfu:.1f} %"]
    return lines


def choice_lines(choices: list[Choice], *, limit: int = 8) -> list[str]:
    """Return the table of the layouts tried, fastest first."""
    lines = [f"{'ep':>4}{'micro-batch':>13}{'checkpointing':>15}{'GB a rank':>11}{'ms a step':>11}   (estimates, fastest first)"]
    return lines + [f"{choice.ep_size:>4}{choice.micro_batch:>13}{choice.activation_checkpointing:>15}"
                    f"{choice.bytes / _GIGA:>11.1f}{1e3 * choice.seconds:>11.1f}{'' if choice.fits else '   does not fit'}"
                    for choice in choices[:limit]]
