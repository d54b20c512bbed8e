"""Values and arguments survive DeepSpeed's quoting and a shell, whatever is in them."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.errors import LaunchError
from promoe_ds.launch.environment import (
    job_environment,
    runner_environment,
    shell_arguments,
    write_environment,
)

#: Nothing that a C string or a line cannot hold.
TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc", "Cs"])
    | st.just("%")
)


def _as_deepspeed_does(argument: str) -> str:
    """What its pdsh runner does to an argument."""
    return '"{}"'.format(argument.replace('"', '\\"')) if " " in argument else argument


def _export(line: str) -> str:
    """What its runner makes of a line of the environment file."""
    name, value = line.split("=", maxsplit=1)
    value = value.strip()
    quoted = f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value
    return f"export {name.strip()}={quoted}; "


def _shell(script: str) -> str:
    """What pdsh, which makes one % of two, and the shell on a host do to a line."""
    assert not re.search(
        "%[^%]", script.replace("%%", "").removeprefix("printf '%s").replace(" printf %s ", "")
    ), "pdsh would act"
    return subprocess.run(
        ["bash", "-c", script.replace("%%", "%")], capture_output=True, check=True
    ).stdout.decode()


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_arguments_arrive_as_they_are(arguments) -> None:
    line = " ".join(_as_deepspeed_does(argument) for argument in shell_arguments(arguments))
    assert _shell(f"printf '%s\\n' {line}").split("\n")[:-1] == arguments


@given(TEXT.map(str.strip))
def test_environment_values_arrive_as_they_are(tmp_path_factory, value) -> None:
    path = tmp_path_factory.mktemp("environment") / "file"
    write_environment(path, {"NAME": value})
    assert _shell(f'{_export(path.read_text())} printf %s "$NAME"') == value


@pytest.mark.parametrize("value", ["a\nb", "a\x00b"])
def test_argument_that_cannot_arrive_is_refused(value) -> None:
    with pytest.raises(LaunchError):
        shell_arguments([value])


def test_environment_files_override_the_shell_and_each_other(tmp_path, monkeypatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / ".deepspeed_env").write_text("# ours\n\nNCCL_DEBUG=INFO\nA=home\nB=x=y\n")
    (here / ".deepspeed_env").write_text("A=here\n")
    assert job_environment(
        {
            "NCCL_DEBUG": "WARN",
            "GLOO_SOCKET_IFNAME": "eth1",
            "CUDA_VISIBLE_DEVICES": "0",
            "MLFLOW_PASSWORD": "x",
            "NVTE_FLASH_ATTN": "0",
            "PYTHONPATH": "",
        }
    ) == {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NVTE_FLASH_ATTN": "0",
        "A": "here",
        "B": "x=y",
    }
    (here / ".deepspeed_env").write_text("A=here\nexport B\n")
    with pytest.raises(LaunchError, match="line 2: 'export B' is not of the form NAME=VALUE"):
        job_environment({})


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('A="x y"', "x y"),
        ("A='x'", "x"),
        ('A=""', ""),
        ("A=it's", "it's"),
        ('A=say "x"', 'say "x"'),
        ('A="x', None),
        ("A='", None),
        ("A='x\"", None),
        ('A="x" "y"', None),
    ],
)
def test_environment_file_quotes_are_taken_off_or_refused(
    tmp_path, monkeypatch, line, value, caplog
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / ".deepspeed_env").write_bytes(f"\ufeff{line}\r\n".encode())
    if value is None:
        with pytest.raises(LaunchError, match="line 1: A="):
            job_environment({})
    else:
        with caplog.at_level("INFO"):
            assert job_environment({}) == {"A": value}
        assert ("line 1: A" in caplog.text) == (value != line[2:])


def test_runner_environment_hides_what_deepspeed_would_export_unescaped() -> None:
    assert runner_environment(
        {"PYTHONPATH": "$(id)", "UCX_TLS": "x", "PATH": "/bin", "NCCL_DEBUG": "a;b"}
    ) == {"PATH": "/bin"}
