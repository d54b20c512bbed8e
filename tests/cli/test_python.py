"""The public names of the package: which there are, and that they do what the commands do."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import promoe_ds
from promoe_ds.errors import CheckpointError, ConfigError, DataError

from ..processes import REPOSITORY, Forks, environment
from .commands import TINY, ZERO2, losses

PAGE = REPOSITORY / "docs" / "reference" / "python.md"
SIGNATURES = {
    "load_model": "(export_dir, device='cpu', dtype=None)",
    "read_routing": "(run_dir)",
    "train": "(recipe, overrides=None, *, run_dir=None, deepspeed_config=…, resume='auto')",
    "reports.expert_load": "(run_dir, *, last_steps=None)",
    "Pipeline.from_pretrained": "(pretrained_model_name_or_path, **options)",
}
CLASSES = ["Pipeline", "ProMoEPipeline", "ProMoETransformer2DModel"]
PUBLIC = ["__version__", "load_model", "read_routing", "reports", "train", *CLASSES]


class _Somewhere:
    """A path that differs from machine to machine."""

    def __repr__(self) -> str:
        return "…"


def public(name: str) -> object:
    """Return what a dotted name below the package is."""
    found: object = promoe_ds
    for part in name.split("."):
        found = getattr(found, part)
    return found


def in_a_process(task: Callable[..., None], *arguments: object) -> None:
    """Run a test's task in a process of its own, as a notebook is one."""
    with Forks(task, arguments, [environment()]) as forks:
        assert forks.wait(240) == [0], forks.texts()


def test_public_names_are_these_and_on_their_page() -> None:
    assert sorted(promoe_ds.__all__) == sorted(PUBLIC)
    assert promoe_ds.reports.__all__ == ["expert_load"]
    text = PAGE.read_text(encoding="utf-8")
    missing = {name for name in [*PUBLIC, *SIGNATURES] if f"`{name}" not in text}
    assert missing <= {"__version__", "reports"}
    assert len(text.splitlines()) <= 90


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_function_has_its_signature_types_and_documentation(name) -> None:
    function = public(name)
    parameters = [
        each.replace(
            annotation=inspect.Parameter.empty,
            default=_Somewhere() if isinstance(each.default, Path) else each.default,
        )
        for each in inspect.signature(function).parameters.values()
    ]
    assert str(inspect.Signature(parameters)) == SIGNATURES[name]
    assert set(function.__annotations__) >= {each.name for each in parameters} | {"return"}
    assert "Raises:" in function.__doc__


def test_import_of_the_package_needs_no_torch() -> None:
    for used, absent in (("0", ("torch", "numpy")), ("promoe_ds.train", ("torch",))):
        code = f"import sys, promoe_ds; {used}; sys.exit(bool(sys.modules.keys() & {set(absent)}))"
        subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = promoe_ds.nothing


def _train_twice(folder: str) -> None:
    before = dict(os.environ)
    overrides = dict(each.split("=") for each in (*TINY, "parallel.ep_size=1"))
    settings = {"run_dir": f"{folder}/api", "deepspeed_config": ZERO2}
    stopped = {**overrides, "train.stop_after_steps": 2}
    assert promoe_ds.train("digits_promoe", stopped, **settings) == Path(folder) / "api"
    promoe_ds.train("digits_promoe", overrides, **settings)
    assert losses(Path(folder) / "api") == losses(Path(folder) / "run")
    try:
        promoe_ds.train("digits_promoe", {**overrides, "train.seed": 1}, **settings)
    except CheckpointError as error:
        assert "train.seed" in str(error)
    other = {**overrides, "train.seed": 1, "logging.tensorboard": False}
    promoe_ds.train("digits_promoe", other, run_dir=f"{folder}/api_other")
    assert dict(os.environ) == before


def test_train_is_the_command_stops_resumes_and_leaves_the_process_as_it_was(trained) -> None:
    in_a_process(_train_twice, str(trained))


def test_train_under_a_launcher_is_refused(monkeypatch, tmp_path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="2: use"):
        promoe_ds.train("digits_promoe", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_read_routing_has_every_count_of_the_log(trained) -> None:
    columns = promoe_ds.read_routing(trained / "run")
    lengths = {len(column) for column in columns.values()}
    assert len(lengths) == 1 and all(column.ndim == 1 for column in columns.values())
    lines = [json.loads(line) for line in (trained / "run/routing.jsonl").read_text().splitlines()]
    assert lengths == {sum(len(line["tokens_per_expert"]) for line in lines)}
    for line in lines:
        here = np.logical_and.reduce(
            [columns[name] == line[name] for name in ("step", "layer", "timestep_bin")]
        )
        assert columns["expert"][here].tolist() == list(range(here.sum()))
        assert columns["tokens"][here].tolist() == line["tokens_per_expert"]
        assert columns["gate_sum"][here] == pytest.approx(line["gate_sum_per_expert"])
        for name in ("conditional_tokens", "unconditional_tokens"):
            assert set(columns[name][here]) == {line[name]}
    with pytest.raises(DataError, match="routing statistics"):
        promoe_ds.read_routing(trained)


def test_expert_load_has_findings_numbers_figures_and_the_page(trained) -> None:
    load = promoe_ds.reports.expert_load(trained / "run")
    assert {finding.level for finding in load.findings()} <= {"bad", "warn", "good"}
    assert load.layers()["layer"] == [1] and len(set(map(len, load.layers().values()))) == 1
    figures = load.figures()
    assert figures["Load over training"]._repr_png_().startswith(b"\x89PNG")
    assert "Layer 1: load by class" in figures
    page = load.to_html()
    assert page.lstrip().lower().startswith("<!doctype html>") and "Load over training" in page


def test_pipeline_of_a_run_and_of_its_export_draw_the_same(trained, tmp_path) -> None:
    images = [
        promoe_ds.Pipeline.from_pretrained(source)([1, 2], num_inference_steps=3).images
        for source in (trained / "run", str(trained / "export"))
    ]
    assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        promoe_ds.Pipeline.from_pretrained(tmp_path)
