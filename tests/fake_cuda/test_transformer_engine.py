"""The trainer's step under the real Python of Transformer Engine, the least version and the newest,
and of Megatron-core: only the library's compiled part is a stub, and there are no numbers.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.trace import trace
from promoe_ds.backends.te_support import LEAST_VERSION

PACKAGES = {
    "least": f"transformer_engine=={'.'.join(map(str, LEAST_VERSION))}.0",
    "newest": "transformer_engine",
}
_FP8 = "precision.compute=fp8"
_MEGATRON = ("parallel.dispatch=megatron", "parallel.ep_size=2", "routing.top_k=2")


class Case(NamedTuple):
    """What is traced, and the library's products in a step of two blocks, the second with experts:
    attention's, the feed-forward's, shared and unconditional experts' as `single`.
    """

    overrides: tuple[str, ...]
    operands: str = "fp8"
    single: int = 10
    grouped: int = 2
    recomputed: tuple[int, int] = (0, 0)


CASES = {
    "bf16": Case(("precision.kernels=transformer_engine", "model.qk_norm=true"), "plain"),
    "current": Case(
        (_FP8, "precision.fp8_recipe=current", "routing.expert_type=swiglu"), "fp8", 12, 3
    ),
    "delayed": Case((_FP8, "precision.fp8_recipe=delayed")),
    "block": Case((_FP8, "precision.fp8_recipe=block")),
    "selective": Case((_FP8, "parallel.activation_checkpointing=selective"), recomputed=(6, 2)),
    "full": Case((_FP8, "parallel.activation_checkpointing=full"), recomputed=(10, 2)),
    "delayed, full": Case(
        (_FP8, "precision.fp8_recipe=delayed", "parallel.activation_checkpointing=full"),
        recomputed=(10, 2),
    ),
    "megatron": Case(_MEGATRON, "plain", 0),
    "megatron, swiglu": Case((*_MEGATRON, _FP8, "routing.expert_type=swiglu"), "fp8", 12),
}
#: Device -> the recipe that `auto` gets, and those that can be asked for.
CHOICES = {
    "a100": (None, set()),
    "l40": ("current", {"delayed", "current"}),
    "h100": ("current", {"delayed", "current", "block"}),
    "h100, CUDA 12.6": ("current", {"delayed", "current"}),
    "b200": ("mxfp8", {"delayed", "current", "block", "mxfp8"}),
    "rtx5090": ("current", {"delayed", "current", "block"}),
}
#: What the least version answers otherwise.
_LEAST_CHOICES = {
    "b200": ("mxfp8", {"delayed", "current", "mxfp8"}),
    "rtx5090": ("mxfp8", {"delayed", "current", "mxfp8"}),
}


def _is_traced(version: str, name: str) -> bool:
    """Megatron-core is newer than the library's least version."""
    return version == "newest" or not name.startswith("megatron")


_each_version = pytest.mark.parametrize("version", PACKAGES)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function: the folder of an unpacked wheel; it skips where pip cannot get one."""
    folder = tmp_path_factory.mktemp("wheels")

    def unpacked(version: str) -> Path:
        target = folder / version
        if not target.is_dir():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--retries", "0"]
            command += ["--only-binary", ":all:", "-d", folder / f"{version} wheel"]
            done = subprocess.run(
                [*command, PACKAGES[version]], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"pip cannot get {PACKAGES[version]}: {done.stderr.strip()[-200:]}")
            (file,) = (folder / f"{version} wheel").iterdir()
            with zipfile.ZipFile(file) as content:
                content.extractall(target)
        return target

    return unpacked


@pytest.fixture(scope="module")
def found(
    wheel: Callable[[str], Path], guard: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Return a function: what was traced under a version, by case; one process for all."""
    pytest.importorskip("triton")
    answers: dict[str, dict[str, Any]] = {}

    def traced(version: str) -> dict[str, Any]:
        if version not in answers:
            process = ("tests.fake_cuda.te_process", str(wheel(version)))
            folder = tmp_path_factory.mktemp("trace")
            names = [name for name in CASES if _is_traced(version, name)]
            asked = [_request(CASES[name]) for name in names]
            got = trace(asked, guard, folder, process=process)
            answers[version] = dict(zip(names, got, strict=True))
        return answers[version]

    return traced


def _request(case: Case) -> dict[str, Any]:
    ranks = 2 if case.overrides[:3] == _MEGATRON else 1
    batch = (f"train.global_batch_size={4 * ranks}", "train.micro_batch_size=4")
    overrides = [*case.overrides, *batch]
    return {"recipe": "promoe_s", "depth": 2, "world_size": ranks, "overrides": overrides}


@pytest.mark.parametrize(
    ("version", "name"),
    [(version, name) for version in PACKAGES for name in CASES if _is_traced(version, name)],
)
def test_a_step_runs_every_product_in_the_library_and_leaves_no_parameter_out(
    found: Callable[[str], dict[str, Any]], version: str, name: str
) -> None:
    one, case = found(version)[name], CASES[name]
    assert "refused" not in one and "failed" not in one, one.get("failed", one)
    assert one["without_gradient"] == []
    expected = {}
    for kind, count, again in (
        ("single", case.single, case.recomputed[0]),
        ("grouped", case.grouped, case.recomputed[1]),
    ):
        expected[f"{kind} {case.operands} forward"] = count + again
        expected[f"{kind} {case.operands} backward"] = 2 * count
    assert one["products"] == {kind: count for kind, count in expected.items() if count}


@_each_version
@pytest.mark.parametrize("name", [name for name in CASES if "megatron" not in name])
def test_the_host_reads_the_experts_counts_and_nothing_else(
    found: Callable[[str], dict[str, Any]], version: str, name: str
) -> None:
    reads = {each["place"]: each["count"] for each in found(version)[name]["host_reads"]}
    passes = 2 if CASES[name].recomputed[1] else 1
    assert reads == {"promoe_ds/backends/te_layers.py:GroupedKernel.__call__": passes}


@_each_version
def test_layers_keep_the_names_of_torchs(found: Callable, version: str) -> None:
    assert found(version)["bf16"]["other_state"] == []


@_each_version
@pytest.mark.parametrize("device", CHOICES)
def test_recipe_choice_is_the_librarys(found: Callable, version: str, device: str) -> None:
    answers = found(version)["bf16"]["choices"][device]
    auto, can = {**CHOICES, **(_LEAST_CHOICES if version == "least" else {})}[device]
    recipes = {name for name in answers if name != "auto" and answers[name] == name}
    assert (recipes, answers["auto"] if auto else None) == (can, auto)
    for name, answer in answers.items():
        if answer.startswith("refused"):
            assert f"fp8_recipe={name}" in answer
            remedies = answer.rpartition(": use ")[2]
            assert remedies == "precision.compute=bf16" or set(remedies.split(" or ")) == can
