"""Parity of whole models, checkpoints, training trajectories, sampling and parameter counts with
the published ones.
"""

from __future__ import annotations

import pytest
import torch

from promoe_ds.backends.parameter_groups import parameter_groups
from promoe_ds.condition import ClassCondition
from promoe_ds.config import count_parameters
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.diffusion.sampler import SamplingPlan, sample_latents
from promoe_ds.model import DiT, build_model
from promoe_ds.model.official import rename_official, to_official
from promoe_ds.training.ema import Ema
from promoe_ds.training.step import TrainingModule

from .conftest import Case
from .published import config_of, method_of, model_config

Tensors = dict[str, torch.Tensor]


def _load(case: Case, **optimizer: object) -> DiT:
    config = model_config(case.sidecar)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})
    network = build_model(config)
    network.reset_positions()
    network.load_state_dict(rename_official(case.tensors("state"), config))
    return network


def _batch(clean, noise, u, labels, null_label: int = 1000) -> DiffusionBatch:
    return DiffusionBatch(clean, noise, u, ClassCondition(labels, null_label))


@pytest.mark.golden_level("model")
def test_model_equals_published(case: Case) -> None:
    network, close = _load(case), case.tolerance
    inputs, expected = case.tensors("in"), case.tensors("out")
    with torch.no_grad():
        torch.testing.assert_close(
            network.eval()(inputs["x"], inputs["t"], inputs["y"]), expected["eval"], **close
        )
    module = TrainingModule(network).train()
    batch = _batch(inputs["train_z"], inputs["train_noise"], inputs["u"], inputs["train_y"])
    output = module(batch)
    prediction = network.denoise(
        module.objective.noised(batch), module.objective.timestep(batch), batch.condition
    ).prediction_BZHW
    torch.testing.assert_close(prediction, expected["train"], **close)
    assert output.terms["diffusion"].item() == pytest.approx(case.sidecar["mse"], rel=close["rtol"])
    near = {"rel": close["rtol"], "abs": close["atol"]}
    losses = {str(block): plan.aux_losses for block, plan in output.plans.items()}
    stated = case.sidecar["aux_loss_per_moe_block"]
    totals = {block: sum(losses[block].values()).item() for block in stated}
    assert totals == pytest.approx(stated, **near)
    for block, value in (case.sidecar["capacity_prediction_bce_per_moe_block"] or {}).items():
        expected_loss = value * network.config.routing.capacity_weight
        assert losses[block]["capacity"].item() == pytest.approx(expected_loss, rel=close["rtol"])
    output.loss.backward()
    _check_gradients(case, network, close)
    _check_running_state(network, output.plans, expected, close)


def _check_running_state(network: DiT, plans, expected: Tensors, close: dict[str, float]) -> None:
    """Routers' buffers after one training pass of one process, where the case states them."""
    for index, layer in network.moe_layers().items():
        if plans[index].observation is not None:
            layer.router.update_running_state(plans[index].observation)
    state = to_official(network.state_dict(), network.config)
    after = {f"after_train.{name}": value for name, value in state.items()}
    _check_named(after, {name: v for name, v in expected.items() if name in after}, close)


def _check_gradients(case: Case, network: DiT, close: dict[str, float]) -> None:
    gradients = to_official(
        {name: p.grad for name, p in network.named_parameters()}, network.config
    )
    norms = case.sidecar["gradient_norms"]
    assert set(gradients) == set(norms)
    moved = {name: torch.tensor(norm) for name, norm in norms.items() if norm is not None}
    _check_named({name: value.norm() for name, value in gradients.items()}, moved, close)
    expected = case.tensors("grad")
    _check_named(gradients, {name: expected[name] for name in moved.keys() & expected}, close)


def _check_named(found: Tensors, expected: Tensors, close: dict[str, float]) -> None:
    """Compare the tensors of these names."""
    torch.testing.assert_close({name: found[name] for name in expected}, expected, **close)


@pytest.mark.golden_level("training trajectory")
def test_trajectory_equals_published(case: Case) -> None:
    """The optimizer, the clipping and the moving average of training, step by step, without an
    engine.
    """
    side = case.sidecar
    training, tolerance = side["training"], side["tolerance"]
    network = _load(
        case,
        lr=training["lr"],
        betas=tuple(training["betas"]),
        eps=training["eps"],
        ema_decays=(training["ema_decay"],),
        weight_decay=training["weight_decay"],
    )
    module = TrainingModule(network).train()
    settings = network.config.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    Ema(optimizer, settings.averages)
    inputs, expected = case.tensors("in"), case.tensors("out")
    initial_labels = network.label_embedding.table.weight.detach().clone()
    for step in range(training["steps"]):
        output = module(_batch(*(inputs[name][step] for name in ("z", "noise", "u", "y"))))
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            module.parameters(), training["clip_total_gradient_norm"]
        )
        assert output.terms["diffusion"].item() == pytest.approx(
            expected["mse"][step].item(), rel=tolerance["mse"]
        )
        aux = torch.stack([sum(plan.aux_losses.values()) for plan in output.plans.values()])
        torch.testing.assert_close(
            aux.detach(), expected["aux"][step], rtol=tolerance["aux"], atol=tolerance["aux"]
        )
        assert norm.item() == pytest.approx(expected["gradient_norm"][step].item(), rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    _check_final(case, network, initial_labels)
    ema = {name: optimizer.state[p]["ema"] for name, p in network.named_parameters()}
    for state, name in ((network.state_dict(), "eval_final"), (ema, "eval_ema")):
        network.load_state_dict(state)
        with torch.no_grad():
            output = network.eval()(inputs["eval_x"], inputs["eval_t"], inputs["eval_y"])
        torch.testing.assert_close(
            output, expected[name], rtol=tolerance["eval_final"], atol=tolerance["eval_final"]
        )


def _check_final(case: Case, network: DiT, initial_labels: torch.Tensor) -> None:
    final, rounding = (
        case.tensors("final"),
        case.sidecar["float64_rerun"]["max_abs_diff_final_per_parameter"],
    )
    rows = case.tensors("in")["label_rows"]
    weights = to_official(network.state_dict(), network.config)
    labels = weights.pop("y_embedder.embedding_table.weight")
    torch.testing.assert_close(labels[rows], final.pop("label_rows"), rtol=1e-3, atol=1e-5)
    untouched = torch.ones(len(labels), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(labels[untouched], initial_labels[untouched])
    for name, expected in final.items():
        value = weights[name]
        if name.endswith("qkv.bias"):
            (q, _, v), (q_expected, _, v_expected) = value.chunk(3), expected.chunk(3)
            value, expected = torch.cat([q, v]), torch.cat([q_expected, v_expected])
        # The reference's own float32 rounding after these steps, times ten; at least 1e-5.
        close = max(1e-5, 10 * (rounding.get(name) or 0.0))
        torch.testing.assert_close(
            value, expected, rtol=1e-3, atol=close, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.golden_level("sampling")
def test_sampling_equals_published(case: Case) -> None:
    side, network = case.sidecar, _load(case).eval()
    inputs, expected = case.tensors("in"), case.tensors("out")
    sampling = side["sampling"]
    for scale in sampling["guidance_scales"]:
        seen = []

        def denoiser(latents, timestep, labels, seen=seen):
            seen.append((latents[: len(inputs["noise"])].clone(), timestep[0].item()))
            return network(latents, timestep, labels)

        plan = SamplingPlan(
            steps=sampling["steps"], cfg_scale=scale, shift=sampling["sample_shift"]
        )
        latents = sample_latents(
            denoiser,
            inputs["noise"],
            ClassCondition(inputs["y"], network.config.model.null_label),
            plan,
        )
        torch.testing.assert_close(latents, expected[f"latent_cfg{scale}"], **case.tolerance)
        torch.testing.assert_close(
            torch.tensor([t for _, t in seen]), expected["timesteps"], **case.tolerance
        )
        path = torch.stack([latent for latent, _ in seen[1:]] + [latents])
        torch.testing.assert_close(path, expected[f"path_cfg{scale}"], **case.tolerance)


@pytest.mark.golden_level("parameter counts")
def test_parameter_counts_equal_published(case: Case, subtests) -> None:
    for name, row in case.sidecar["counts"].items():
        with subtests.test(name):
            sizes = {key: row[key] for key in ("hidden_size", "depth", "num_heads")}
            method = method_of(row["kind"])
            routing: dict = {"method": method}
            if method in ("dit_moe", "ec_dit", "diff_moe"):
                routing |= {"num_experts": 8, "num_shared_experts": 0}
                routing |= {"num_unconditional_experts": 0}
            config = config_of(sizes, routing)
            count = count_parameters(config)
            for kind in ("total", "activated", "trainable"):
                assert getattr(count, kind) == row[f"{kind}_parameters"], kind
            assert count.position_embedding == row["fixed_position_embedding"]
            with torch.device("meta"):
                parameters = build_model(config).parameters()
            assert sum(value.numel() for value in parameters) == row["trainable_parameters"]
