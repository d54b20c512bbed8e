"""What a hostfile may say; what it may not is refused with its line."""

from __future__ import annotations

import pytest

from promoe_ds.errors import LaunchError
from promoe_ds.launch.hostfile import Host, expand_hosts, read_hostfile, write_hostfile


def test_hostfile_comments_and_empty_lines_are_skipped(tmp_path) -> None:
    (tmp_path / "hosts").write_text(
        "# eight GPUs each\n\ngpu-01.cluster slots=8\n  gpu_02   slots=4  \n"
    )
    hosts = [Host("gpu-01.cluster", 8), Host("gpu_02", 4)]
    assert read_hostfile(tmp_path / "hosts") == hosts
    write_hostfile(tmp_path / "again", hosts)
    assert read_hostfile(tmp_path / "again") == hosts


def test_hostfile_of_another_editor_and_with_brackets_is_read(tmp_path) -> None:
    (tmp_path / "hosts").write_bytes(
        "\ufeffgpu[08-10,2]-ib slots=4  # rack 1\r\n10.0.0.7 slots=1\r\n".encode()
    )
    names = ["gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu2-ib"]
    assert read_hostfile(tmp_path / "hosts") == [
        *(Host(name, 4) for name in names),
        Host("10.0.0.7", 1),
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu01", ["gpu01"]),
        ("gpu[03-05,9],login1", ["gpu03", "gpu04", "gpu05", "gpu9", "login1"]),
        ("a-1,b-2", ["a-1", "b-2"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("node-[099-101]", ["node-099", "node-100", "node-101"]),
    ],
)
def test_list_of_hosts_is_expanded(text: str, names: list[str]) -> None:
    assert expand_hosts(text) == names


@pytest.mark.parametrize(
    "name",
    [
        "a;reboot",
        "$(id)",
        "`id`",
        "a|b",
        "a&b",
        "gpu[1-4",
        "a,,b",
        "root@a",
        "a:22",
        "-oProxy=x",
        "a*",
        "a'b",
        'a"b',
        "a\\b",
        "^hosts",
        "%n",
        "~root",
        "a>b",
        "{a,b}",
        "ü",
        "a-",
        ".a",
        "::1",
        "[::1]",
        "[fe80::1]:22",
        "gpu[3-1]",
        "gpu[1-]",
        "gpu[]",
        "gpu[1-9999999]",
        "gpu]1[",
    ],
)
def test_hostfile_name_with_metacharacters_is_refused(tmp_path, name) -> None:
    (tmp_path / "hosts").write_text(f"good slots=1\n{name} slots=1\n")
    with pytest.raises(LaunchError, match=r"line 2: .*is no host name"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a", "not of the form"),
        ("a slots=", "not of the form"),
        ("a slots=-1", "slots=-1 must be"),
        ("a slots=0", "slots=0 must be"),
        ("a slots=1.5", "slots=1.5 must be"),
        ("a slots=²", "slots=² must be"),
        ("a slots=99999", "must be a number from 1 to 1024"),
        ("a slots=1 slots=2", "not of the form"),
        ("good slots=2", "good is listed twice"),
        ("GOOD slots=2", "GOOD is listed twice"),
        ("a[1-2,02,2] slots=1", "a2 is listed twice"),
        ("a slots=" + "9" * 5000, "slots=9"),
        ("a max_slots=4", "not of the form"),
    ],
)
def test_hostfile_bad_line_is_named(tmp_path, line, message) -> None:
    (tmp_path / "hosts").write_text(f"good slots=1\n{line}\n")
    with pytest.raises(LaunchError, match=f"line 2: .*{message}"):
        read_hostfile(tmp_path / "hosts")


def test_hostfile_missing_or_without_hosts_is_an_error_not_a_single_host(tmp_path) -> None:
    with pytest.raises(LaunchError, match=r"hosts: no such file.*single_node\.sh"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_text("# nobody\n")
    with pytest.raises(LaunchError, match="no host in it"):
        read_hostfile(tmp_path / "hosts")
