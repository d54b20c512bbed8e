"""What needs CUDA: grouped GEMM in bf16 and fp32, routing without synchronisation, one training run
under nccl.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe import StackedExperts
from promoe_ds.routing import ROUTERS, partition_samples
from tests.cli.commands import REPOSITORY, run, train_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _config_of(method: str) -> RunConfig:
    values = load_config("promoe_s").model_dump(mode="json")
    values["routing"] |= {
        "method": method,
        **({"superclass_map": "digits"} if method == "classification" else {}),
    }
    return config_from_dict(values, source="test")


def _filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module.cuda()


@pytest.mark.parametrize("counts", [(5, 0, 17, 10), (0, 0, 32, 0), (0, 0, 0, 0), (8, 8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_gemm_cuda_equals_loop_in_fp64(dtype, counts) -> None:
    experts = _filled(StackedExperts(4, 128, 256)).to(dtype)
    rows = torch.randn(sum(counts), 128, device="cuda", dtype=dtype, requires_grad=True)
    tokens = torch.tensor(counts, device="cuda")
    output = experts(rows, tokens)
    output.sum().backward()
    reference = StackedExperts(4, 128, 256, backend="loop").double().cuda()
    reference.load_state_dict(
        {name: value.double() for name, value in experts.state_dict().items()}
    )
    rows64 = rows.detach().double().requires_grad_()
    expected = reference(rows64, tokens)
    expected.sum().backward()
    close = (
        {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 2e-3}
    )
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(rows.grad.double(), rows64.grad, **close)
    for (name, p), q in zip(experts.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad.double(), q.grad, **close, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("method", ROUTERS)
def test_router_and_losses_make_no_host_synchronisation(method) -> None:
    config = _config_of(method)
    layer = _filled(build_moe_layer(config)).bfloat16().train()
    if method == "classification":
        layer.router.set_superclasses([label % 12 for label in range(1000)])
    tokens = torch.randn(
        4,
        config.model.tokens_per_image,
        config.model.hidden_size,
        device="cuda",
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    partition = partition_samples(
        ClassCondition(torch.tensor([1, 1000, 3, 4], device="cuda"), config.model.null_label)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, plan = layer(tokens, partition)
        (output.float().mean() + sum(plan.aux_losses.values())).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("method", ROUTERS)
def test_method_cuda_equals_cpu(method, train) -> None:
    """Outputs, losses and gradients of a layer in fp32; inputs of this size have no near ties."""
    config = _config_of(method)
    layers = {"cuda": _filled(build_moe_layer(config)).train(train)}
    layers["cpu"] = copy.deepcopy(layers["cuda"]).cpu()
    tokens, labels = (
        torch.randn(4, config.model.tokens_per_image, config.model.hidden_size),
        torch.tensor([1, 1000, 3, 4]),
    )
    found = {}
    for device, layer in layers.items():
        if method == "classification":
            layer.router.set_superclasses([label % 12 for label in range(1000)])
        if method == "kmeans":
            layer.router.centroids.copy_(tokens[0, :12])
        x = tokens.to(device).requires_grad_()
        output, plan = layer(
            x, partition_samples(ClassCondition(labels.to(device), config.model.null_label))
        )
        (output.square().mean() + sum(plan.aux_losses.values())).backward()
        found[device] = {
            "output": output.detach().cpu(),
            "tokens": x.grad.cpu(),
            "counts": plan.assignment.tokens_per_expert_E.cpu(),
            "losses": [loss.detach().cpu() for loss in plan.aux_losses.values()],
        }
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("config", ["zero2_fp32.json", "zero2_bf16.json"])
def test_training_cuda_follows_cpu(tmp_path: Path, config: str) -> None:
    path = str(REPOSITORY / "ds_configs" / config)
    losses = {}
    for name, env in (("cuda", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})):
        source = path if name == "cuda" else str(REPOSITORY / "ds_configs" / "zero2_fp32.json")
        arguments = train_arguments(
            "parallel.ep_size=1", "parallel.dispatch=alltoall", run_dir=name, config=source
        )
        done = run(sys.executable, "-m", "promoe_ds.cli.train", *arguments, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        losses[name] = [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4 if "fp32" in config else 5e-2)
