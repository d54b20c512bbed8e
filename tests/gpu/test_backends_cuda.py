"""What needs CUDA of the expert paths, precisions and scale: Transformer Engine, Megatron-core,
offloading, compilation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from promoe_ds.backends.te_layers import use_transformer_engine
from promoe_ds.backends.te_support import find_transformer_engine
from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.model import build_model, initialise
from promoe_ds.moe.comm_dtype import COMM_DTYPES
from tests.cli.commands import REPOSITORY, run, train_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    find_transformer_engine()[0] is None, reason="needs Transformer Engine"
)

#: Largest relative error of a pass against float64: of bf16 with torch's kernels, and of FP8.
BF16_ERROR, FP8_ERROR = 2e-2, 1.5e-1


def _config(**precision: str) -> RunConfig:
    values = load_config("promoe_s", ["model.depth=2"]).model_dump(mode="json")
    return config_from_dict({**values, "precision": precision}, source="test")


def _network(config: RunConfig) -> torch.nn.Module:
    network = build_model(config)
    initialise(network, 0)
    for name, parameter in network.named_parameters():
        if "modulation" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(
                parameter, std=0.02
            )  # zero at the start: nothing would reach the output
    return network.cuda().train()


def _pass(
    network: torch.nn.Module, context, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 32, 32, generator=generator).to("cuda", dtype)
    labels = torch.tensor([1, 1000, 3, 4, 5, 6, 1000, 8], device="cuda")
    with context():
        output = network.denoise(
            latents, torch.linspace(0, 1000, 8, device="cuda"), labels
        ).prediction_BZHW
    output.square().mean().backward()
    return output.detach().double(), {
        name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@needs_te
@pytest.mark.parametrize("recipe", ["bf16", "delayed", "current", "block", "mxfp8"])
def test_transformer_engine_pass_is_near_float64(recipe: str) -> None:
    from promoe_ds.errors import ConfigError

    is_fp8 = recipe != "bf16"
    config = _config(
        **(
            {"compute": "fp8", "fp8_recipe": recipe}
            if is_fp8
            else {"kernels": "transformer_engine"}
        )
    )
    network = _network(config).bfloat16()
    reference = _network(config)
    reference.load_state_dict(network.state_dict())
    try:
        context = use_transformer_engine(network, config, torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))
    found = _pass(network, context, torch.bfloat16)
    for layer in reference.moe_layers().values():
        layer.routed.backend = "loop"
    expected = _pass(reference.double(), torch.enable_grad, torch.float64)
    bound = FP8_ERROR if is_fp8 else BF16_ERROR
    assert _error(found[0], expected[0]) < bound
    for name in (
        "blocks.0.attention.qkv.weight",
        "blocks.0.feed_forward.down.weight",
        "blocks.1.moe.shared.up.weight",
    ):
        assert _error(found[1][name], expected[1][name]) < 2 * bound, name


@pytest.mark.parametrize("is_gradient", [False, True])
def test_fp8_wire_cuda_equals_cpu(is_gradient: bool) -> None:
    rows = torch.randn(64, 96)
    packed = [
        COMM_DTYPES["fp8"].pack(rows.to(device), is_gradient=is_gradient)
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(packed[0], packed[1].cpu())


def _losses(folder: Path, name: str, *overrides: str, deepspeed: dict | None = None) -> list[float]:
    source = folder / f"{name}.json"
    values = json.loads((REPOSITORY / "ds_configs" / "zero2_bf16.json").read_text())
    values["zero_optimization"] |= deepspeed or {}
    source.write_text(json.dumps({**values, "bf16": {"enabled": "auto"}}))
    arguments = train_arguments(
        "parallel.ep_size=1",
        "parallel.dispatch=alltoall",
        "precision.compute=bf16",
        *overrides,
        run_dir=name,
        config=str(source),
    )
    done = run(sys.executable, "-m", "promoe_ds.cli.train", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line)["loss"]
        for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _losses(tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.dispatch=deepspeed_moe",),
        ("parallel.dispatch=megatron",),
        ("parallel.dispatch=megatron", "parallel.megatron_dispatcher=allgather"),
        ("parallel.activation_checkpointing=selective",),
        ("parallel.compile=true",),
    ],
    ids=lambda overrides: "-".join(each.partition("=")[2] for each in overrides),
)
def test_training_cuda_option_follows_plain(
    tmp_path: Path, plain: list[float], overrides: tuple[str, ...]
) -> None:
    assert _losses(tmp_path, "run", *overrides) == pytest.approx(plain, rel=2e-2)


def test_training_cuda_offloaded_optimizer_follows_plain(
    tmp_path: Path, plain: list[float]
) -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert _losses(tmp_path, "run", deepspeed=offload) == pytest.approx(plain, rel=5e-3)


@needs_te
@pytest.mark.parametrize("dispatch", ["alltoall", "deepspeed_moe", "megatron"])
def test_training_cuda_fp8_follows_bf16(tmp_path: Path, plain: list[float], dispatch: str) -> None:
    losses = _losses(tmp_path, "run", "precision.compute=fp8", f"parallel.dispatch={dispatch}")
    assert losses == pytest.approx(plain, rel=5e-2)
