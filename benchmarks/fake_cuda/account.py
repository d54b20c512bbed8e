"""What a traced step asks for, sorted into categories and priced by shares of an H100's peaks."""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import Any

from benchmarks.fake_cuda.recorder import Call, Recorder
from promoe_ds.backends.devices import DEVICES
from promoe_ds.planning.work import Efficiency

_DEVICE, _SHARES = DEVICES["h100"], Efficiency()
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward"}
#: Operations of `promoe_ds.kernels` -> their category.
_FUSED = {
    **dict.fromkeys(
        (
            "cosine",
            "cosine_backward",
            "contrast",
            "contrast_backward",
            "mean_similarity",
            "sort_choices",
            "sort_choices_backward",
            "sum_by_expert",
            "spread_to_tokens",
        ),
        "router",
    ),
    **dict.fromkeys(("combine", "combine_backward", "sum_rows_of_tokens"), "permute and combine"),
    **dict.fromkeys(
        (
            "modulated_norm",
            "modulated_norm_backward",
            "residual_norm",
            "residual_norm_backward",
            "gated_residual",
            "gated_residual_backward",
        ),
        "norms, modulation, gates",
    ),
    "join_heads": "layout of attention",
    **dict.fromkeys(("bias_gelu", "bias_gelu_backward"), "experts: biases, activation"),
}
#: What the place of an operation contains -> its category; the first that fits.
_PLACES = {
    "training/health.py": "health",
    "training/routing_log.py": "routing log",
    "routing/assignment.py:sum_tokens_by_expert": "routing log",
    "training/ema.py": "averages of the weights",
    "zero_private.py:DeviceGate": "gradient norm",
    "reduction_private.py:GradientReducer.own_norms": "gradient norm",
    "backends/gradient_sums.py": "gradients: buckets and copies",
    "stage_1_and_2.py:DeepSpeedZeroOptimizer.get_flat_partition": "clip and casts of the update",
    "stage_1_and_2.py:DeepSpeedZeroOptimizer.unscale_and_clip": "clip and casts of the update",
    "stage_1_and_2.py:DeepSpeedZeroOptimizer.step": "clip and casts of the update",
    "stage_1_and_2.py:DeepSpeedZeroOptimizer.update_lp_params": "clip and casts of the update",
    "deepspeed/": "gradients: buckets and copies",
    "training/clipping.py": "gradient norm",
    "routing/": "router",
    "kernels/ops.py:rows_of_tokens": "permute and combine",
    "moe/experts.py": "experts: biases, activation",
    "moe/products.py": "experts: biases, activation",
    "moe/": "permute and combine",
    "backends/": "permute and combine",
    "model/blocks.py:SelfAttention": "layout of attention",
    "model/blocks.py:_SplitHeads": "layout of attention",
    "model/rotary.py": "layout of attention",
    "model/": "norms, modulation, gates",
}


def category(call: Call) -> str:
    """Return what an operation is for."""
    if "attention" in call.name:
        return "attention"
    if call.name in _PRODUCTS and call.work.dtype == "bfloat16":
        return "products in bf16"
    if call.name.startswith("_fused_adam") or call.name == "adamw":
        return "AdamW"
    if call.name in _FUSED:
        return _FUSED[call.name]
    return next((kind for part, kind in _PLACES.items() if part in call.place.name), "rest")


def seconds(call: Call) -> float:
    """Predict an operation's time."""
    return call.work.seconds(_DEVICE, _SHARES)


def summary(recorder: Recorder) -> dict[str, Any]:
    """Return what was recorded as plain values: totals, by category, by operation and place.

    `sequence` is the same for steps that ask for the same operations in the same order and shapes.
    """
    by_category, operations = (defaultdict(lambda: [0, 0, 0, 0.0]) for _ in range(2))
    for call in recorder.calls:
        kind = category(call)
        key = (kind, call.place.name, call.name, call.work.dtype, call.is_backward)
        for sums in (by_category[kind], operations[key]):
            for index, value in enumerate(
                (call.work.kernels, call.work.bytes, call.work.flops, seconds(call))
            ):
                sums[index] += value
    sent: dict[tuple[str, int, int, str], int] = defaultdict(int)
    for one, place in recorder.sent:
        sent[one.name, len(one.members), one.bytes, place.name] += 1
    sequence = [(call.name, call.work.dtype, call.shapes) for call in recorder.calls]
    totals = [sum(column) for column in zip(*by_category.values(), strict=True)]
    return {
        "totals": _figures(totals),
        "sequence": sha256(repr(sequence).encode()).hexdigest(),
        "categories": {
            kind: _figures(sums)
            for kind, sums in sorted(by_category.items(), key=lambda item: -item[1][3])
        },
        "host_reads": [
            {"place": place.name, "line": place.line, "count": count}
            for place, count in recorder.reads.items()
        ],
        "waits": [
            {"for": what, "place": place.name, "line": place.line, "count": count}
            for (what, place), count in recorder.waits.items()
        ],
        "copies": [
            {"way": way, "place": place.name, "line": place.line, "count": count}
            for (way, place), count in recorder.copies.items()
        ],
        "collectives": [
            {"name": name, "ranks": ranks, "bytes": size, "place": place, "count": count}
            for (name, ranks, size, place), count in sent.items()
        ],
        "events_unread": len(recorder.events),
        "operations": [
            dict(zip(("category", "place", "name", "dtype", "backward"), key, strict=True))
            | _figures(sums)
            for key, sums in sorted(operations.items(), key=lambda item: -item[1][3])
        ],
    }


def _figures(sums: list[Any]) -> dict[str, Any]:
    kernels, moved, flops, time = sums
    return {"kernels": kernels, "bytes": moved, "flops": flops, "ms": 1e3 * time}
