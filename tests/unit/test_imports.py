"""Who may import what, room by room, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "promoe_ds"

#: Rooms with a closed list of libraries beside the standard one.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "private_names": set(),
    "torch_private": {"torch"},
    "logs": set(),
    "files": set(),
    "file_kind": set(),
    "versions": {"torch"},
    "randomness": {"numpy"},
    "load_stats": {"numpy"},
    "condition": {"torch"},
    "config": {"pydantic", "pydantic_core", "yaml"},
    "kernels": {"torch", "triton"},
    "routing": {"torch"},
    "moe": {"torch"},
    "model": {"torch", "numpy", "safetensors", "xxhash"},
    "diffusion": {"torch", "numpy", "diffusers"},
    # Pillow decodes images, diffusers encodes them; resvg draws emoji, transformers encodes texts;
    # pyarrow reads parquet, huggingface_hub fetches it.
    # Tensors and records carry xxhash checksums.
    "data": {"torch", "numpy", "safetensors", "sklearn", "PIL", "diffusers", "xxhash", "msgspec"}
    | {"transformers", "resvg_py", "pyarrow", "huggingface_hub"},
    # Runs on the launching host, before any rank, and must not need torch there.
    "launch": {"psutil"},
    "run_files": set(),
    "distributed": {"torch", "numpy"},
}
#: The rooms from the lowest up; a room imports from those above it in this list and from none
# below.
ORDER = (
    "errors",
    "registry",
    "private_names",
    "torch_private",
    "logs",
    "files",
    "file_kind",
    "run_files",
    "randomness",
    "load_stats",
    "condition",
    "config",
    "versions",
    "kernels",
    "routing",
    "moe",
    "model",
    "diffusion",
    "launch",
    "distributed",
    "data",
    "backends",
    "checkpoint",
    "training",
)
#: Rooms that need less than the order would let them have.
NARROW: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "private_names": {"errors"},
    "torch_private": {"errors", "private_names"},
    "logs": set(),
    "files": set(),
    "file_kind": set(),
    "run_files": set(),
    "randomness": set(),
    "load_stats": set(),
    "condition": set(),
    "config": {"errors", "logs"},
    "versions": {"errors", "config"},
    "kernels": set(),
    "routing": {"errors", "registry", "config", "condition", "kernels", "torch_private"},
    "moe": {"torch_private", "registry", "routing", "config", "kernels"},
    "diffusion": {"config", "randomness", "errors", "condition"},
    "launch": {"errors", "logs", "files", "run_files", "config"},
    "distributed": {"errors", "logs", "config", "launch"},
    "data": {
        "config",
        "randomness",
        "errors",
        "logs",
        "files",
        "file_kind",
        "condition",
        "versions",
        "distributed",
    },
}
ROOMS = {room: NARROW.get(room, set(ORDER[:place])) for place, room in enumerate(ORDER)}
ENGINES = {"deepspeed", "megatron"}
#: Rooms free in their libraries: all but the engines' own.
OPEN = {"evaluation", "reports", "planning", "pipeline", "api", "cli"}
KNOWN = set(ROOMS) | OPEN | {"__init__"}
TORCH_DISTRIBUTED = {"moe/collectives.py", "moe/dispatch.py"}
BELOW_ENGINE = {"routing", "moe", "model", "diffusion", "data"}


def room_of(path: str) -> str:
    """Return the room of a file, given relative to the package."""
    return Path(path).parts[0].removesuffix(".py")


def imported(source: str, path: str) -> set[str]:
    """Return every dotted name that a file imports, wherever it does so; `from a import b` gives
    a.b.
    """
    names: set[str] = set()
    package = ["promoe_ds", *Path(path).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str:
    """Return a.b.c of an attribute chain, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def violations(source: str, path: str) -> list[str]:
    """Return what a file at `path` (relative to the package) imports against the table."""
    room, found = room_of(path), []
    if room not in KNOWN:
        return [f"{room} is no room of the table"]
    for name in sorted(imported(source, path)):
        library = name.partition(".")[0]
        if library == "promoe_ds":
            target = name.split(".")[1]
            if not _may_enter(room, target):
                found.append(f"{room} must not import {name}")
        elif library in ("tools", "benchmarks"):
            found.append(f"the package must not import {name}")
        elif library in ENGINES and room != "backends":
            found.append(f"only backends may import {name}")
        elif room in LIBRARIES and library not in sys.stdlib_module_names | LIBRARIES[room]:
            found.append(f"{room} must not import {name}")
        elif (
            name.startswith("torch.distributed")
            and room in BELOW_ENGINE
            and path not in TORCH_DISTRIBUTED
        ):
            found.append(f"{path} must not import {name}")
    if room in BELOW_ENGINE and path not in TORCH_DISTRIBUTED:
        uses = {
            dotted(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
        }
        found += [f"{path} must not use {use}" for use in uses & {"torch.distributed"}]
    return found


def _may_enter(room: str, target: str) -> bool:
    if target in (room, "__version__"):
        return True
    if target == "cli":
        return False
    if room in OPEN:
        return True
    if room == "__init__":
        return target in ("model", "pipeline", "reports", "api")  # what is public, deferred
    return target in ROOMS[room]


def test_imports_keep_to_the_table() -> None:
    files = {
        file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8")
        for file in PACKAGE.rglob("*.py")
    }
    assert {
        path: found for path, source in files.items() if (found := violations(source, path))
    } == {}
    assert set(ROOMS) <= {room_of(path) for path in files}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "import numpy"),
        ("randomness.py", "import torch"),
        ("config/schema.py", "import torch"),
        ("config/schema.py", "def f():\n    from torch import Tensor"),
        ("config/schema.py", "from promoe_ds.routing import Partition"),
        ("routing/scores.py", "from promoe_ds.moe.experts import FeedForward"),
        ("routing/scores.py", "from ..moe import experts"),
        ("routing/scores.py", "import torch.distributed as dist"),
        ("routing/scores.py", "from torch import distributed"),
        ("routing/scores.py", "import torch\ntorch.distributed.get_rank()"),
        ("moe/layer.py", "import torch.distributed as dist"),
        ("moe/layer.py", "import numpy"),
        ("model/dit.py", "from promoe_ds.training import step"),
        ("model/dit.py", "import deepspeed"),
        ("diffusion/sampler.py", "from promoe_ds.model import DiT"),
        ("diffusion/sampler.py", "from promoe_ds import model"),
        ("data/order.py", "import pandas"),
        ("training/loop.py", "from promoe_ds.evaluation import images"),
        ("training/loop.py", "from promoe_ds.cli.train import main"),
        ("training/loop.py", "import tools.convert_checkpoint"),
        ("training/metrics.py", "from promoe_ds.planning.zero import States"),
        ("planning/search.py", "from benchmarks.timing import interleave"),
        ("planning/search.py", "from promoe_ds.cli.dry_run import describe"),
        ("evaluation/images.py", "from deepspeed.moe import layer"),
        ("evaluation/images.py", "from promoe_ds.cli import train"),
        ("cli/train.py", "import deepspeed"),
        ("cli/train.py", "import megatron.core"),
        ("newroom/x.py", ""),
    ],
)
def test_imports_check_finds_a_violation(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe/dispatch.py", "import torch.distributed as dist"),
        (
            "moe/layer.py",
            (
                "from .experts import FeedForward\nfrom promoe_ds.routing import Partition\nimport"
                " torch.nn"
            ),
        ),
        (
            "backends/expert_parallel.py",
            "import deepspeed, megatron.core, torch.distributed\nfrom promoe_ds.data import order",
        ),
        ("evaluation/x.py", "import scipy\nfrom promoe_ds.checkpoint import load"),
        (
            "cli/train.py",
            "from promoe_ds.cli.entry import run_entry\nfrom promoe_ds.training.loop import train",
        ),
    ],
)
def test_imports_check_passes_what_is_allowed(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_package_root_imports_nothing_heavy_when_imported() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_import = {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in imported(ast.unparse(node), "__init__.py")
    }
    assert {name.partition(".")[0] for name in at_import} <= sys.stdlib_module_names


def test_export_and_sampling_import_no_training_engine() -> None:
    # An export loads and samples where deepspeed, megatron and transformer-engine are not
    # installed.
    code = (
        "import sys\nfor name in ('deepspeed', 'megatron', 'transformer_engine'): sys.modules[name]"
        " = None\nimport promoe_ds; promoe_ds.load_model\nimport promoe_ds.evaluation.sample_job,"
        " promoe_ds.data, promoe_ds.cli.sample\nimport promoe_ds.evaluation.metrics,"
        " promoe_ds.data.encode, promoe_ds.cli.evaluate\npromoe_ds.ProMoEPipeline,"
        " promoe_ds.ProMoETransformer2DModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_imports_no_library_of_pictures_or_texts() -> None:
    # diffusers brings transformers, peft and scipy: most of the time that a rank took to start.
    code = (
        "import sys\nimport promoe_ds.training.run, promoe_ds.cli.train\nsys.exit(' '.join("
        "{'diffusers', 'transformers', 'scipy', 'sklearn'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_functions_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 350, path
        functions = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)]
        long = [x.name for x in functions if (x.end_lineno or 0) - x.lineno >= 60]
        assert not long, (path, long)
