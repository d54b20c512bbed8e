"""From a reference sidecar's hyperparameters to a config."""

from __future__ import annotations

from typing import Any

from promoe_ds.config import RunConfig, config_from_dict

#: How a sidecar's `model_class` or a count's `kind` maps to routing.method.
METHODS = {
    "dense DiT": "dense",
    "ProMoE, token choice": "token_choice",
    "ProMoE token-choice MoE layer": "token_choice",
    "ProMoE, expert choice": "expert_choice",
    "ProMoE expert-choice MoE layer": "expert_choice",
    "TC-DiT (token choice baseline)": "dit_moe",
    "token-choice baseline MoE layer (TC-DiT)": "dit_moe",
    "EC-DiT (expert choice baseline)": "ec_dit",
    "expert-choice baseline MoE layer (EC-DiT)": "ec_dit",
    "DiffMoE baseline": "diff_moe",
    "DiffMoE baseline MoE layer": "diff_moe",
}
#: Fields of the model section that a sidecar names likewise.
_SIZES = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qk_norm",
    "num_classes",
    "learn_sigma",
)


def method_of(model_class: str) -> str:
    """Return the method of a `model_class` or `kind`, which may carry its level behind a comma."""
    return next(method for name, method in METHODS.items() if model_class.startswith(name))


def model_config(sidecar: dict[str, Any]) -> RunConfig:
    """Return the config of a whole-model case."""
    hyper, method = sidecar["hyperparameters"], method_of(sidecar["model_class"])
    assert hyper["null_label"] == hyper["num_classes"]
    routing = {"method": "dense"}
    if method != "dense":
        routing = routing_of(hyper["moe"], method, hyper["hidden_size"])
    return config_of({key: hyper[key] for key in _SIZES}, routing)


def layer_config(sidecar: dict[str, Any]) -> RunConfig:
    """Return a config whose MoE layers are those of a layer case."""
    hyper, method = sidecar["hyperparameters"], method_of(sidecar["model_class"])
    model = {
        "hidden_size": hyper["hidden_size"],
        "depth": 2,
        "num_heads": 1,
        "num_classes": hyper.get("null_label", 1000),
    }
    return config_of(model, routing_of(hyper, method, hyper["hidden_size"]))


def config_of(model: dict[str, Any], routing: dict[str, Any]) -> RunConfig:
    """Return a config of these sections."""
    return config_from_dict(
        {
            "name": "golden",
            "model": model,
            "routing": routing,
            "train": {"max_steps": 1},
            "data": {"dataset": "synthetic"},
        },
        source="golden case",
    )


def routing_of(hyper: dict[str, Any], method: str, width: int) -> dict[str, Any]:
    """Return the routing section of a case."""
    if method not in ("token_choice", "expert_choice"):
        return _baseline(hyper, method, width)
    blocks = hyper.get("moe_blocks", "odd block indices (1, 3, ...)")
    routing = {
        "method": method,
        "moe_blocks": "interleave" if blocks.startswith("odd") else "all",
        "num_experts": hyper["num_routed_experts"],
        "expert_width": hyper["expert_intermediate_size"],
        "shared_expert_width": (
            hyper["shared_expert_intermediate_size"] if hyper["use_shared_expert"] else None
        ),
        "top_k": hyper["top_k"] if "top_k" in hyper else hyper["expert_capacity_factor"],
        "activation": hyper["router_weight_mode"],
        "num_shared_experts": int(hyper["use_shared_expert"]),
        "num_unconditional_experts": int(hyper["use_unconditional_expert"]),
        "rcl_weight": hyper["routing_contrastive_weight"],
        "rcl_temperature": hyper["routing_contrastive_temperature"],
        "rcl_scope": "rank",
    }
    if method == "token_choice":
        routing |= {
            "rcl_assignments": "all" if hyper["routing_contrastive_counts_all_top_k"] else "first",
            "balance_weight": hyper["load_balance_coefficient"] or 0,
            "balance_level": "sample" if hyper["load_balance_per_sample"] else "batch",
        }
    return routing


def _baseline(hyper: dict[str, Any], method: str, width: int) -> dict[str, Any]:
    shared = hyper.get("shared_expert_width_multiple", hyper.get("num_shared_experts", 0)) or 0
    routing: dict[str, Any] = {
        "method": method,
        "num_experts": hyper["num_experts"],
        "num_unconditional_experts": 0,
        "num_shared_experts": shared,
        "shared_expert_type": "swiglu" if shared else None,
        "shared_expert_width": width if shared else None,
        "expert_width": hyper.get("expert_intermediate_size"),
        "top_k": next(
            hyper[name] for name in ("top_k", "capacity", "capacity_or_top_k") if name in hyper
        ),
    }
    if method == "dit_moe":
        routing |= {
            "balance_weight": hyper.get("load_balance_coefficient") or 0,
            "balance_level": "sample" if hyper.get("load_balance_per_sample") else "batch",
        }
    if method == "diff_moe":
        routing |= {
            "capacity_weight": hyper["capacity_prediction_weight"],
            "threshold_decay": hyper["threshold_ema_decay"],
        }
    return routing
