"""From a reference sidecar's hyperparameters to a config, and which methods are built."""

from __future__ import annotations

from typing import Any

import pytest

from promoe_ds.config import RunConfig, config_from_dict

#: How a sidecar's `model_class` or a count's `kind` maps to routing.method; the others are not built yet.
METHODS = {
    "dense DiT": "dense",
    "ProMoE, token choice": "token_choice",
    "ProMoE token-choice MoE layer": "token_choice",
}


def method_or_skip(model_class: str) -> str:
    if model_class not in METHODS:
        pytest.skip(f"method not built yet: {model_class}")
    return METHODS[model_class]


def model_config(hyper: dict[str, Any], method: str) -> RunConfig:
    """Return the config of a whole-model case."""
    assert hyper["null_label"] == hyper["num_classes"]
    model = {key: hyper[key] for key in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
                                         "mlp_ratio", "qk_norm", "num_classes", "learn_sigma")}
    return _config(model, _routing(hyper["moe"], method) if method != "dense" else {"method": "dense"})


def layer_config(hyper: dict[str, Any], method: str) -> RunConfig:
    """Return a config whose MoE layers are those of a layer case."""
    model = {"hidden_size": hyper["hidden_size"], "depth": 2, "num_heads": 1, "num_classes": hyper["null_label"]}
    return _config(model, _routing(hyper, method))


def _routing(hyper: dict[str, Any], method: str) -> dict[str, Any]:
    blocks = hyper.get("moe_blocks", "odd block indices (1, 3, ...)")
    return {
        "method": method, "moe_blocks": "interleave" if blocks.startswith("odd") else "all",
        "num_experts": hyper["num_routed_experts"], "expert_width": hyper["expert_intermediate_size"],
        "shared_expert_width": hyper["shared_expert_intermediate_size"] or None, "top_k": hyper["top_k"],
        "activation": hyper["router_weight_mode"], "num_shared_experts": int(hyper["use_shared_expert"]),
        "num_unconditional_experts": int(hyper["use_unconditional_expert"]),
        "rcl_weight": hyper["routing_contrastive_weight"], "rcl_temperature": hyper["routing_contrastive_temperature"],
        "rcl_assignments": "all" if hyper["routing_contrastive_counts_all_top_k"] else "first", "rcl_scope": "rank",
        "balance_weight": hyper["load_balance_coefficient"] or 0,
        "balance_level": "sample" if hyper["load_balance_per_sample"] else "batch",
    }


def _config(model: dict[str, Any], routing: dict[str, Any]) -> RunConfig:
    return config_from_dict({"name": "golden", "model": model, "routing": routing, "train": {"max_steps": 1},
                             "data": {"dataset": "synthetic"}}, source="golden case")
