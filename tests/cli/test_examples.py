"""The files of `examples/` do what they say, at a small size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ..processes import REPOSITORY
from .commands import (
    TINY,
    ZERO2,
    check_refused,
    losses,
    module,
    succeed,
    tool,
    train_arguments,
)
from .test_python import in_a_process

EXAMPLES = REPOSITORY / "examples"
ROUTER = ("routing.method=nearest", "routing.options={temperature: 0.5}", "routing.top_k=2")
SHAPES = ("data.dataset=shapes", "model.input_size=16", "model.num_classes=3")


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("name", "settings"), [("custom_router", ROUTER), ("custom_dataset", SHAPES)]
)
def test_example_of_one_s_own_trains_converts_and_samples(tmp_path, name, settings) -> None:
    own = ("--import", str(EXAMPLES / f"{name}.py"))
    arguments = train_arguments("parallel.ep_size=1", *settings)
    succeed(module("train", *own, *arguments, cwd=tmp_path))
    assert len(losses(tmp_path / "run")) == 4
    succeed(module("convert_checkpoint", *own, "run", "export", "--to", "single", cwd=tmp_path))
    drawn = ("--model", "export", "--out", "samples", "--num", "3", "--steps", "2")
    succeed(module("sample", *own, *drawn, cwd=tmp_path))
    assert (tmp_path / "samples/samples.npz").is_file()
    # Without the file nothing knows the name, and nothing of a run or an export imports it.
    word = settings[0].partition("=")[2]
    check_refused(module("sample", *drawn, cwd=tmp_path), f"={word}: is none of", 4)


@pytest.mark.combinations
def test_router_of_one_s_own_is_compared_on_two_ranks(tmp_path) -> None:
    """The file is imported by the comparison, by each rank under the launcher, and by the judge."""
    own = ("--import", str(EXAMPLES / "custom_router.py"), "--ranks", "2", "--jobs", "1")
    candidate = ("--variant", f"nearest=digits_promoe,{','.join(ROUTER)}")
    sizes = ("--steps", "4", "--samples", "20", "--deepspeed-config", ZERO2)
    overrides = ("parallel.ep_size=2", "sampling.steps=2", *TINY)
    where = ("--out", "out", "--set", *(one for one in overrides if "max_steps" not in one))
    done = tool("compare", *own, *candidate, *sizes, *where, cwd=tmp_path, timeout=240)
    log = tmp_path / "out/logs/nearest-seed0.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.is_file() else "")
    (nearest,) = json.loads((tmp_path / "out/comparison.json").read_text())["contenders"]
    assert nearest["config"]["routing"]["options"] == {"temperature": 0.5}
    result = nearest["seeds"]["0"]
    assert result["checkpoint_step"] == 4 and result["images"]["samples"] == 20


def test_options_of_one_s_own_router_are_kept_with_the_run_and_checked(tmp_path) -> None:
    own = ("--import", str(EXAMPLES / "custom_router.py"))
    for given, said in (
        ("routing.options={temperature: 0}", "temperature=0: input should be greater than 0"),
        ("routing.options={heat: 1}", "heat=1: no such option; there are temperature"),
    ):
        arguments = train_arguments("parallel.ep_size=1", ROUTER[0], given)
        check_refused(module("train", *own, *arguments, "--dry-run", cwd=tmp_path), said, 2)
    arguments = train_arguments("parallel.ep_size=1", ROUTER[0])
    text = succeed(module("train", *own, *arguments, "--dry-run", cwd=tmp_path))
    recipe = yaml.safe_load(text.partition("# recipe\n")[2].partition("# deepspeed")[0])
    assert recipe["routing"]["options"] == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", "--import nowhere.py: there is no such file"),
        ("no.such.module", "--import no.such.module: there is no such module"),
    ],
)
def test_import_of_nothing_is_refused(tmp_path, name, said) -> None:
    done = module("train", "--import", name, *train_arguments(), cwd=tmp_path)
    check_refused(done, said, 2)


def _finetune(folder: str) -> None:
    example, run_dir = load("finetune_from_export"), Path(folder) / "finetuned"
    tiny = dict(each.split("=") for each in TINY)
    settings = {**tiny, **example.SETTINGS, "train.max_steps": 4}
    assert example.finetune(Path(folder) / "export", run_dir, settings) == run_dir
    assert len(losses(run_dir)) == 4


def test_example_of_fine_tuning(trained) -> None:
    in_a_process(_finetune, str(trained))


def test_example_of_sampling_with_diffusers(trained, tmp_path) -> None:
    example = load("sample_with_diffusers")
    first = example.draw(trained / "export", tmp_path / "a", steps=2, each=1)
    again = example.draw(tmp_path / "a" / "pipeline", tmp_path / "b", steps=2, each=1)
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.combinations
@pytest.mark.timeout(900)
def test_notebook_runs_and_its_outputs_are_committed(tmp_path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = EXAMPLES / "notebooks" / "experts_in_ten_minutes.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if "import numpy" not in cell.source)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert (tmp_path / "runs/notebook/expert_load.html").is_file()
