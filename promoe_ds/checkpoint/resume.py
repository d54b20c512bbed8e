"""Which checkpoint a run continues from: its newest sound one, a named one, or none.

Where that is in doubt, it is an error.

A run that was started from a named checkpoint remembers it (`start.json`): the same command given
again, by hand or by a scheduler that repeats it, continues with what the run has reached, and
`auto` never falls back to step 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from promoe_ds.checkpoint.manifest import (
    find_problems,
    list_checkpoints,
    list_unfinished,
    named_checkpoints,
    read_manifest,
    step_of,
)
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import CheckpointError, first_few
from promoe_ds.files import write_json
from promoe_ds.logs import get_logger

_LOG = get_logger("checkpoint")
_START = "start.json"
_ABANDONED = ".abandoned"
#: More problems of one checkpoint are counted, not listed.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a run continues.

    folder: the checkpoint, None for step 0.
    same_run: whether the run has come by it itself; else it starts a branch.
    """

    folder: Path | None = None
    same_run: bool = True


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The checkpoint that a run was started from: its path as it was named, absolute, and its
    step.
    """

    named: str
    step: int


def choose_checkpoint(request: str, run_dir: Path, ranks: DistributedContext) -> Choice:
    """Resolve `--resume`; all ranks call this together.

    Checkpoints of the run's own that are later than the one it continues from are renamed: damaged,
    or another branch's.
    Args:
        request: "none", "auto" (newest sound one of this run) or the path of a checkpoint or of a
            run directory.
    Raises: CheckpointError if a path has no sound checkpoint, or one that this run does not stem
        from; or if the run must not start from step 0, because it has checkpoints of which none is
        sound, or was started from one by path.
    """
    root = run_dir / "checkpoints"
    if request == "none":
        ranks.on_main(lambda: (run_dir / _START).unlink(missing_ok=True))
        return Choice()
    own, start = ranks.on_main(lambda: (list_checkpoints(root), _read_start(run_dir)))
    if request == "auto":
        return _continue_run(own, root, ranks, start)
    named = ranks.on_main(lambda: str(Path(request).resolve()))
    reached = [folder for folder in own if start is not None and step_of(folder) >= start.step]
    if start is not None and start.named == named and reached:
        _LOG.info(
            "resume: this run was started from %s before and goes on with its own checkpoints; to"
            " start from there anew, take another --run-dir",
            request,
        )
        return _continue_run(reached, root, ranks, start)
    folder = _choose_named(Path(request), ranks)
    if ranks.on_main(lambda: folder.resolve().parent == root.resolve()):
        ranks.on_main(lambda: _set_later_aside(root, read_manifest(folder).step))
    elif own:
        raise CheckpointError(
            f"--resume {request}: {run_dir} already holds checkpoints of its own, up to"
            f" {own[0].name}, and was not started from there: go on by --resume auto, or take"
            " another --run-dir"
        )
    _LOG.info("resume: taking %s", folder)
    ranks.on_main(
        lambda: write_json(run_dir / _START, {"named": named, "step": read_manifest(folder).step}),
    )
    return Choice(folder=folder, same_run=False)


def _continue_run(
    candidates: list[Path], root: Path, ranks: DistributedContext, start: _Start | None
) -> Choice:
    skipped = [f"{path} (the save never ended)" for path in ranks.from_main(list_unfinished(root))]
    chosen, problems = _newest_sound(candidates, ranks)
    _report_skipped([*skipped, *problems], ranks)
    if chosen is None and candidates:
        raise CheckpointError(
            f"--resume auto: none of the checkpoints under {root} is sound: {'; '.join(problems)}."
            " Restore one, name another with --resume DIR, or start anew in another --run-dir"
        )
    if chosen is None and start is not None:
        raise CheckpointError(
            f"--resume auto: this run was started from {start.named} and has no checkpoint of its"
            f" own under {root}: name that again (--resume {start.named}), or start anew in another"
            " --run-dir"
        )
    _LOG.info(
        "resume: %s",
        f"taking {chosen}" if chosen else f"no checkpoint under {root}, starting from step 0",
    )
    if chosen is not None:
        ranks.on_main(lambda: _set_later_aside(root, step_of(chosen)))
    return Choice(folder=chosen)


def _set_later_aside(root: Path, step: int) -> None:
    for folder in list_checkpoints(root):
        if step_of(folder) > step:
            names = (
                folder.with_name(f"{folder.name}{_ABANDONED}{f'_{number}' * (number > 1)}")
                for number in count(1)
            )
            aside = next(path for path in names if not path.exists())
            folder.rename(aside)
            _LOG.warning(
                "resume: the run goes on from step %d; %s is set aside as %s",
                step,
                folder,
                aside.name,
            )


def _choose_named(path: Path, ranks: DistributedContext) -> Path:
    candidates = ranks.on_main(lambda: named_checkpoints(path), flag="--resume ")
    chosen, problems = _newest_sound(candidates, ranks)
    if chosen is None:
        raise CheckpointError(f"--resume {path}: {'; '.join(problems)}")
    _report_skipped(problems, ranks)
    return chosen


def _report_skipped(lines: list[str], ranks: DistributedContext) -> None:
    for line in lines if ranks.is_main else ():
        _LOG.warning("resume: skipped %s", line)


def _newest_sound(
    candidates: list[Path], ranks: DistributedContext
) -> tuple[Path | None, list[str]]:
    skipped: list[str] = []
    for candidate in candidates:
        problems = _problems(candidate, ranks)
        if not problems:
            return candidate, skipped
        skipped.append(first_few(problems, _SHOWN))
    return None, skipped


def _problems(folder: Path, ranks: DistributedContext) -> list[str]:
    """Verify a checkpoint, each rank a share of its files; return the same list on all ranks."""
    try:
        files = read_manifest(folder).files
        mine = dict(sorted(files.items())[ranks.rank :: ranks.world_size])
        problems = find_problems(folder, mine)
    except CheckpointError as error:
        problems = [str(error)]
    gathered = [line for lines in ranks.gather(problems) for line in lines]
    return list(dict.fromkeys(gathered))


def _read_start(run_dir: Path) -> _Start | None:
    path = run_dir / _START
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return _Start(named=str(values["named"]), step=int(values["step"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: cannot be understood ({type(error).__name__}: {error}); it says which"
            " checkpoint the run was started from: remove it to go on by --resume auto"
        ) from None
