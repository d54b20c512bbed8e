"""From a config to a router: the one table of methods."""

from __future__ import annotations

from collections.abc import Callable

from promoe_ds.config.routing import RoutingConfig
from promoe_ds.config.schema import RunConfig
from promoe_ds.routing import (
    BatchPoolRouter,
    ClassificationRouter,
    ExpertRaceRouter,
    KMeansRouter,
    LinearExpertChoiceRouter,
    LinearGateRouter,
    PrototypeExpertChoiceRouter,
    Router,
    TwoStepRouter,
    TwoStepSettings,
)


def build_router(config: RunConfig) -> Router:
    """Build the router of one MoE layer, uninitialised."""
    return ROUTERS[config.routing.method](config)


def _two_step_settings(routing: RoutingConfig) -> TwoStepSettings:
    return TwoStepSettings(
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        activation=routing.activation,
        score_scale=routing.score_scale,
        rcl_weight=routing.rcl_weight,
        rcl_temperature=routing.rcl_temperature,
        rcl_assignments=routing.rcl_assignments,
        balance_weight=routing.balance_weight,
        balance_level=routing.balance_level,
    )


def _token_choice(config: RunConfig) -> Router:
    return TwoStepRouter(config.model.hidden_size, _two_step_settings(config.routing))


def _expert_choice(config: RunConfig) -> Router:
    return PrototypeExpertChoiceRouter(config.model.hidden_size, _two_step_settings(config.routing))


def _dit_moe(config: RunConfig) -> Router:
    routing = config.routing
    return LinearGateRouter(
        config.model.hidden_size,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        balance_weight=routing.balance_weight,
        balance_level=routing.balance_level,
    )


def _ec_dit(config: RunConfig) -> Router:
    return LinearExpertChoiceRouter(
        config.model.hidden_size, config.routing.num_experts, config.routing.top_k
    )


def _diff_moe(config: RunConfig) -> Router:
    routing = config.routing
    return BatchPoolRouter(
        config.model.hidden_size,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        capacity_weight=routing.capacity_weight,
        threshold_decay=routing.threshold_decay,
    )


def _expert_race(config: RunConfig) -> Router:
    routing = config.routing
    return ExpertRaceRouter(
        config.model.hidden_size,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        activation=routing.activation,
        similarity_weight=routing.similarity_weight,
        patch_values=config.target_patch_values,
        threshold_decay=routing.threshold_decay,
    )


def _classification(config: RunConfig) -> Router:
    return ClassificationRouter(
        config.model.hidden_size,
        num_experts=config.routing.num_experts,
        loss_weight=config.routing.classification_weight,
    )


def _kmeans(config: RunConfig) -> Router:
    return KMeansRouter(config.model.hidden_size, num_experts=config.routing.num_experts)


#: How each routing.method is built.
ROUTERS: dict[str, Callable[[RunConfig], Router]] = {
    "token_choice": _token_choice,
    "expert_choice": _expert_choice,
    "dit_moe": _dit_moe,
    "ec_dit": _ec_dit,
    "diff_moe": _diff_moe,
    "expert_race": _expert_race,
    "classification": _classification,
    "kmeans": _kmeans,
}
