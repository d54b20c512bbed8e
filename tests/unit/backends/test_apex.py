"""NVIDIA apex's FusedAdam in torch's place: same updates, averages and state; what is no apex is
refused.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

from promoe_ds.backends.apex import INSTALL, build_apex_adam, check_apex
from promoe_ds.checkpoint.torch_file import load_torch
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.errors import ConfigError

from ..averaged import AveragedOptimizer

SETTINGS = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), ema_decays=(0.9,))
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STATE = {"step", "exp_avg", "exp_avg_sq", "ema"}


class FusedAdam(Optimizer):
    """A stand-in with apex's documented signature and state: it counts steps by group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert adam_w_mode and bias_correction
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            (first, second), step = group["betas"], group["step"]
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p) for _ in "12")
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - second)
                root = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
                change = state["exp_avg"] / (1 - first**step) / root + group["weight_decay"] * p
                p -= group["lr"] * change


def install(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    vars(optimizers).update(attributes)
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


class Trained(AveragedOptimizer):
    def __init__(self, kind: str) -> None:
        options = {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "eps": SETTINGS.eps, "fused": True}
        plain, apex = partial(AdamW, **options), partial(build_apex_adam, settings=SETTINGS)
        super().__init__(apex if kind == "apex" else plain, SETTINGS)


def assert_same(one: Trained, other: Trained) -> None:
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        states = one.optimizer.state[mine], other.optimizer.state[theirs]
        assert states[0].keys() == states[1].keys() == STATE
        for name in STATE:
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-6, atol=1e-7)


def test_apex_updates_and_keeps_its_state_as_torch_does(monkeypatch) -> None:
    install(monkeypatch, FusedAdam=FusedAdam)
    apex, plain = Trained("apex"), Trained("torch")
    for has_gradients in (True, True, False, True):
        for each in (apex, plain):
            each.update(has_gradients=has_gradients)
    assert_same(apex, plain)
    assert not any("step" in group for group in apex.optimizer.param_groups)


@pytest.mark.parametrize(("before", "after"), [("torch", "apex"), ("apex", "torch")])
def test_each_continues_the_others_state(monkeypatch, before: str, after: str) -> None:
    install(monkeypatch, FusedAdam=FusedAdam)
    whole, first, second = Trained(before), Trained(before), Trained(after)
    for _ in range(4):
        whole.update()
    for _ in range(2):
        first.update()
    second.continue_from(first)
    for _ in range(2):
        second.update()
    assert_same(second, whole)


def test_apex_state_comes_back_by_its_own_dictionary(monkeypatch) -> None:
    install(monkeypatch, FusedAdam=FusedAdam)
    saved, loaded = Trained("apex"), Trained("apex")
    saved.update()
    loaded.continue_from(saved)
    loaded.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    for each in (saved, loaded):
        each.update()
    assert_same(saved, loaded)


def test_apex_not_installed_is_said_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match=r"implementation=apex .*NVIDIA/apex") as caught:
        check_apex(CUDA, offloads=False)
    assert caught.value.exit_code == 2
    assert INSTALL in str(caught.value)


def test_other_package_of_this_name_is_refused(monkeypatch) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match=r"FusedAdam.*PyPI is another"):
        check_apex(CUDA, offloads=False)


def test_apex_without_kernels_is_refused(monkeypatch) -> None:
    def build(*unused: Any, **options: Any) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    install(monkeypatch, FusedAdam=build)
    with pytest.raises(ConfigError, match=r"requires cuda extensions"):
        build_apex_adam([], SETTINGS)


@pytest.mark.parametrize(
    ("device", "offloads", "where"), [(CPU, False, "the cpu"), (CUDA, True, "offload_optimizer")]
)
def test_apex_off_the_device_is_refused(monkeypatch, device, offloads, where) -> None:
    install(monkeypatch, FusedAdam=FusedAdam)
    with pytest.raises(ConfigError, match=where):
        check_apex(device, offloads=offloads)
    check_apex(CUDA, offloads=False)


def test_a_run_with_apex_leaves_decisions_to_the_host(tmp_path, monkeypatch) -> None:
    from promoe_ds.backends.deepspeed_private import forget_expert_groups
    from promoe_ds.cli import train
    from promoe_ds.distributed.process_group import stop_distributed
    from promoe_ds.training import trainer

    install(monkeypatch, FusedAdam=FusedAdam)
    monkeypatch.setattr(trainer, "check_apex", lambda device, offloads: None)
    monkeypatch.setattr(trainer, "decides_on_device", lambda *unused: True)
    monkeypatch.setattr(trainer, "DeviceGate", None)  # not to be made
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "") or monkeypatch.delenv(name)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    small = ["parallel.ep_size=1", "model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
    small += ["train.global_batch_size=8", "train.max_steps=2", "logging.tensorboard=false"]
    files = ["--deepspeed_config", str(tmp_path / "ds.json"), "--run-dir", str(tmp_path / "run")]
    try:
        train.main(
            ["--recipe", "digits_promoe", *files]
            + ["--set", *small, "optimizer.implementation=apex"]
        )
    finally:
        stop_distributed()
        forget_expert_groups()
    (file,) = (tmp_path / "run/checkpoints/step_0000002").glob("*zero_pp_rank_0_*optim_states.pt")
    state = load_torch(file)["optimizer_state_dict"]["base_optimizer_state"]
    assert [set(one) for one in state["state"].values()] == [STATE] * len(state["state"])
    assert {int(one["step"]) for one in state["state"].values()} == {2}
