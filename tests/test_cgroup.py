"""Limits and kills as control groups of both versions write them, in folders made up for the test."""

from pathlib import Path

import pytest

from autotune.cgroup import ControlGroups

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712"


def groups(tmp_path: Path, membership: str, **files: str) -> ControlGroups:
    """`memory__docker__x__memory.max="1"` is the file memory/docker/x/memory.max under the root."""
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "self").write_text(membership + "\n")
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 5\n")
    return ControlGroups(root=root, membership=tmp_path / "self", system=tmp_path / "vmstat")


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        pytest.param("0::/", {"memory.max": str(GIB)}, GIB, id="v2, a container's own root"),
        pytest.param("0::/", {"memory.max": "max"}, None, id="v2, no limit"),
        pytest.param("0::/a/b", {"a__memory.max": str(2 * GIB), "a__b__memory.max": "max"}, 2 * GIB, id="v2, above"),
        pytest.param("0::/a/b", {"a__memory.max": str(2 * GIB), "a__b__memory.max": str(GIB)}, GIB, id="v2, nested"),
        pytest.param("0::/a/b", {"a__memory.max": str(GIB), "a__b__memory.max": str(2 * GIB)}, GIB, id="v2, outer"),
        pytest.param("4:memory:/", {"memory__memory.limit_in_bytes": str(GIB)}, GIB, id="v1"),
        pytest.param("4:memory:/", {"memory__memory.limit_in_bytes": UNLIMITED_V1}, None, id="v1, no limit"),
        pytest.param(
            "4:memory:/docker/x\n1:cpu:/",
            {"memory__memory.limit_in_bytes": UNLIMITED_V1, "memory__docker__x__memory.limit_in_bytes": str(GIB)},
            GIB,
            id="v1, nested",
        ),
        pytest.param(
            "4:memory:/docker/the/hosts/path", {"memory__memory.limit_in_bytes": str(GIB)}, GIB, id="v1, host's path"
        ),
        pytest.param(
            "4:memory:/x\n0::/y", {"memory__x__memory.limit_in_bytes": str(GIB)}, GIB, id="both, memory in v1"
        ),
        pytest.param("", {}, None, id="none"),
        pytest.param("nonsense", {"memory.max": "1"}, None, id="nonsense"),
    ],
)
def test_memory_limit(tmp_path: Path, membership: str, files: dict[str, str], limit: int | None) -> None:
    assert groups(tmp_path, membership, **files).memory_limit_bytes() == limit


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        pytest.param("0::/", {"cpu.max": "150000 100000"}, 1.5, id="v2"),
        pytest.param("0::/a", {"cpu.max": "200000 100000", "a__cpu.max": "max 100000"}, 2.0, id="v2, above"),
        pytest.param("0::/", {"cpu.max": "max 100000"}, None, id="v2, none"),
        pytest.param(
            "1:cpu:/a", {"cpu__a__cpu.cfs_quota_us": "50000", "cpu__a__cpu.cfs_period_us": "100000"}, 0.5, id="v1"
        ),
        pytest.param(
            "1:cpu:/", {"cpu__cpu.cfs_quota_us": "-1", "cpu__cpu.cfs_period_us": "100000"}, None, id="v1, none"
        ),
        pytest.param(
            "1:cpu,cpuacct:/",
            {"cpu,cpuacct__cpu.cfs_quota_us": "400000", "cpu,cpuacct__cpu.cfs_period_us": "100000"},
            4.0,
            id="v1, mounted together",
        ),
    ],
)
def test_cpu_quota(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    assert groups(tmp_path, membership, **files).cpu_quota() == quota


@pytest.mark.parametrize(
    ("membership", "files", "kills"),
    [
        pytest.param("0::/a", {"a__memory.events": "oom 3\noom_kill 2\noom_group_kill 9"}, 2, id="v2"),
        pytest.param("4:memory:/a", {"memory__a__memory.oom_control": "under_oom 0\noom_kill 1"}, 1, id="v1"),
        pytest.param("4:memory:/a", {"memory__a__memory.oom_control": "under_oom 0"}, 5, id="v1, an old kernel"),
        pytest.param("0::/", {}, 5, id="no group: the machine's own count"),
    ],
)
def test_oom_kills(tmp_path: Path, membership: str, files: dict[str, str], kills: int) -> None:
    assert groups(tmp_path, membership, **files).oom_kills() == kills


def test_without_any_count(tmp_path: Path) -> None:
    assert ControlGroups(root=tmp_path, membership=tmp_path / "no", system=tmp_path / "no").oom_kills() is None
