"""Splitting a dense feed-forward: the parts add up to it where they can."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.model.state import state_shapes
from promoe_ds.model.upcycle import DENSE_PARAMETERS, UnitSplit, split_units, upcycled_parameter
from promoe_ds.moe.experts import FEED_FORWARDS

from ..builders import random_tensor, randomise, small_config

#: Name -> routing of a network of dense width 64; whether conditional tokens (gate 1) and null
# tokens keep the dense function.
SPLITS = {
    "halves": ({}, True, True),
    "shared_holds_all": ({"shared_expert_width": 64}, True, True),
    "shared_wider_than_dense": ({"shared_expert_width": 100}, True, True),
    "two_shared": (
        {"num_shared_experts": 2, "shared_expert_width": 16, "expert_width": 32},
        True,
        True,
    ),
    "no_shared": ({"num_shared_experts": 0}, True, True),
    "experts_wider_than_the_rest": ({"expert_width": 48, "shared_expert_width": 32}, True, True),
    "experts_narrower_than_the_rest": (
        {"expert_width": 8, "shared_expert_width": 32},
        False,
        False,
    ),
    "two_unconditional": (
        {"expert_width": 16, "shared_expert_width": 32, "num_unconditional_experts": 2},
        False,
        True,
    ),
    "swiglu_shared": ({"shared_expert_type": "swiglu", "expert_width": 64}, True, True),
    "swiglu_experts": ({"expert_type": "swiglu", "shared_expert_type": "gelu"}, False, False),
}


def build(
    routing: dict, scale: float = 1.0, noise: float = 0.0, kind: str = "gelu"
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], UnitSplit]:
    """Return a dense feed-forward, the parameters of the layer made of it, and how it was dealt
    out.
    """
    config = small_config(model={"mlp_type": kind}, routing={"num_experts": 3, **routing})
    dense = randomise(FEED_FORWARDS[kind](16, 64))
    values = {
        ours: dense.get_parameter(theirs).detach()
        for ours, theirs in DENSE_PARAMETERS[kind].items()
    }
    split = split_units(config)
    layer = {
        name.removeprefix("blocks.1.moe."): upcycled_parameter(
            name, shape, values, split, config, gate_scale=scale, noise=noise
        )
        for name, shape in state_shapes(config).items()
        if name.startswith("blocks.1.moe.") and ".router." not in name
    }
    return dense, layer, split


def run(
    layer: dict[str, torch.Tensor], part: str, x: torch.Tensor, expert: int | None = None
) -> torch.Tensor:
    """Compute one part, or one expert of the routed part; zero where there is none."""
    weights = {
        name.removeprefix(f"{part}.").replace("_", "."): value if expert is None else value[expert]
        for name, value in layer.items()
        if name.startswith(f"{part}.")
    }
    if not weights:
        return torch.zeros_like(x)
    kind = FEED_FORWARDS["swiglu" if "gate.weight" in weights else "gelu"]
    return torch.func.functional_call(kind(1, 1), weights, (x,))


@pytest.mark.parametrize("kind", FEED_FORWARDS)
@pytest.mark.parametrize("name", SPLITS)
def test_split_parts_add_up_to_the_dense_function_where_it_says_so(name: str, kind: str) -> None:
    routing, conditional, null = SPLITS[name]
    if kind == "swiglu":  # each type in the other's place
        other = {"gelu": "swiglu", "swiglu": "gelu"}
        routing = {"expert_type": "gelu"} | routing
        routing = {field: other.get(value, value) for field, value in routing.items()}
    dense, layer, split = build(routing, kind=kind)
    x = random_tensor(20, 16)
    expected, shared = dense(x).detach(), run(layer, "shared", x)
    assert (split.routed_is_exact, split.unconditional_is_exact) == (conditional, null)
    for expert in range(3):
        close = torch.allclose(
            shared + run(layer, "routed", x, expert), expected, rtol=1e-4, atol=1e-4
        )
        assert close is conditional, expert
    assert (
        torch.allclose(shared + run(layer, "unconditional", x), expected, rtol=1e-4, atol=1e-4)
        is null
    )


def test_split_narrow_experts_take_windows_that_cover_the_rest() -> None:
    split = split_units(
        small_config(routing={"num_experts": 4, "expert_width": 8, "shared_expert_width": 32})
    )
    assert [one.units.tolist() for one in split.routed] == [
        list(range(start, start + 8)) for start in (32, 40, 48, 56)
    ]


def test_split_scale_multiplies_routed_experts_alone() -> None:
    plain, scaled = build({})[1], build({}, scale=2.5)[1]
    for name, value in plain.items():
        factor = 2.5 if name.startswith("routed.down") else 1.0
        torch.testing.assert_close(scaled[name], factor * value)


def test_split_silent_experts_of_another_type_start_as_the_recipe_says() -> None:
    routing = {"expert_type": "swiglu", "expert_init_std": 0.006}
    _, layer, split = build(routing)
    assert split.routed is None
    for name in ("routed.up_weight", "routed.gate_weight", "unconditional.up.weight"):
        assert layer[name].std().item() == pytest.approx(0.006, rel=0.1), name


def test_split_noise_tells_copies_apart_by_as_much_as_asked() -> None:
    plain, noisy = build({})[1], build({}, noise=0.1)[1]
    changed = [name for name, value in plain.items() if not torch.equal(noisy[name], value)]
    assert changed == ["routed.up_weight"]
    assert torch.equal(plain["routed.up_weight"][0], plain["routed.up_weight"][1])
    difference = noisy["routed.up_weight"] - plain["routed.up_weight"]
    assert difference.std() == pytest.approx(0.1 * plain["routed.up_weight"].std().item(), rel=0.1)
