"""Training under autocast through the real engine, and on to other precisions and back."""

from __future__ import annotations

from .jobs import Job, metrics, run_jobs


def test_autocast_run_resumes_in_other_precisions_and_they_in_it(tmp_path) -> None:
    """One run in pieces: autocast, bf16 weights, autocast again, fp32; beside it all in fp32."""

    def piece(name: str, compute: str, stop: int | None) -> Job:
        until = () if stop is None else (f"train.stop_after_steps={stop}",)
        return Job(
            run_dir=tmp_path / name,
            bf16=compute == "bf16",
            overrides=(
                "parallel.ep_size=2",
                "train.max_steps=12",
                f"precision.compute={compute}",
                *until,
            ),
        )

    pieces = [("bf16_autocast", 3), ("bf16", 3), ("bf16_autocast", 3), ("fp32", None)]
    jobs = [piece("changing", *each) for each in pieces] + [piece("fp32", "fp32", None)]
    assert run_jobs(2, jobs, tmp_path) == [""] * 5
    changing, exact = metrics(tmp_path / "changing"), metrics(tmp_path / "fp32")
    assert [line["step"] for line in changing] == [line["step"] for line in exact]
    for one, other in zip(changing, exact, strict=True):
        assert abs(one["loss"] - other["loss"]) < 0.02 * other["loss"], one["step"]
    assert changing[0]["loss"] != exact[0]["loss"]
    log = (tmp_path / "changing" / "train.log").read_text()
    assert [word for word in ("bf16_autocast", "bf16,", "fp32,") if word not in log] == []
