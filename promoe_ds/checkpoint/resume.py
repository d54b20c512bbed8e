"""Which checkpoint a run continues from: its newest sound one, a named one, or none.

Where that is in doubt, it is an error.

A run that was started from a named checkpoint remembers it (`start.json`): the same command given
again, by hand or by a scheduler that repeats it, continues with what the run has reached, and
`auto` never falls back to step 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
from msgspec import Struct

from promoe_ds.checkpoint.manifest import (
    find_problems,
    list_checkpoints,
    list_unfinished,
    named_checkpoints,
    read_manifest,
    step_of,
)
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import CheckpointError, explaining, first_few
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


class _Start(Struct, frozen=True):
    """The checkpoint that a run was started from: its path as it was named, absolute, and its
    step.
    """

    named: str
    step: int


def choose_checkpoint(
    request: str,
    run_dir: Path,
    ranks: DistributedContext,
    find: Callable[[Path], list[Path]] = named_checkpoints,
) -> Choice:
    """Resolve `--resume`; all ranks call this together.

    Checkpoints of the run's own that are later than the one it continues from are renamed: damaged,
    or another branch's.
    Args:
        request: "none", "auto" (newest sound one of this run) or the path of a checkpoint or of a
            run directory.
        find: returns the checkpoints that a path names, newest first; rank 0 calls it.
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
            "resume: this run was started from %s before and continues with its own checkpoints; to"
            " start from there anew, take another --run-dir",
            request,
        )
        return _continue_run(reached, root, ranks, start)
    candidates = ranks.on_main(lambda: find(Path(request)), flag="--resume ")
    folder = _newest_sound(candidates, ranks, request)
    if ranks.on_main(lambda: folder.resolve().parent == root.resolve()):
        ranks.on_main(lambda: _set_later_aside(root, read_manifest(folder).step))
    elif own:
        raise CheckpointError(
            f"--resume {request}: {run_dir} already holds checkpoints of its own, up to"
            f" {own[0].name}, and was not started from there: continue by --resume auto, or take"
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
    for path in list_unfinished(root) if ranks.is_main else ():
        _LOG.warning("resume: skipped %s (the save never ended)", path)
    if candidates:
        chosen = _newest_sound(candidates, ranks, "auto")
        _LOG.info("resume: taking %s", chosen)
        ranks.on_main(lambda: _set_later_aside(root, step_of(chosen)))
        return Choice(folder=chosen)
    if start is not None:
        raise CheckpointError(
            f"--resume auto: this run was started from {start.named} and has no checkpoint of its"
            f" own under {root}: name that again (--resume {start.named}), or start anew in another"
            " --run-dir"
        )
    _LOG.info("resume: starting from step 0, %s has no checkpoint yet", root)
    return Choice()


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
                "resume: the run continues from step %d; %s is set aside as %s",
                step,
                folder,
                aside.name,
            )


def _newest_sound(candidates: list[Path], ranks: DistributedContext, request: str) -> Path:
    """Return the newest checkpoint that is sound; report those that are skipped.

    Raises: CheckpointError if none is.
    """
    skipped: list[str] = []
    for candidate in candidates:
        if problems := _problems(candidate, ranks):
            skipped.append(first_few(problems, _SHOWN))
            continue
        for line in skipped if ranks.is_main else ():
            _LOG.warning("resume: skipped %s", line)
        return candidate
    raise CheckpointError(
        f"--resume {request}: none of the checkpoints is sound: {'; '.join(skipped)}. Restore one,"
        " name another with --resume DIR, or start anew in another --run-dir"
    )


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
    with explaining(
        f"{path}: says which checkpoint the run was started from, and cannot be understood: remove"
        " it to continue by --resume auto"
    ):
        if not path.exists():
            return None
        return msgspec.json.decode(path.read_bytes(), type=_Start)
