"""Limits of Linux control groups for this process, versions 1 and 2, nested groups included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ControlGroups:
    """Control groups of a process. All limits up to the root apply, so the smallest one counts."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")
    system: Path = Path("/proc/vmstat")
    """Counts OOM kills on the whole machine, if no group counts them."""

    def memory_limit_bytes(self) -> int | None:
        """Smallest memory limit; None: no limit."""
        limits = [*self._numbers("", "memory.max"), *self._numbers("memory", "memory.limit_in_bytes")]
        # version 1 writes "no limit" as the largest multiple of a page
        return min((limit for limit in limits if limit < 1 << 60), default=None)

    def cpu_quota(self) -> float | None:
        """CPU time in cores; None: no limit."""
        quotas = []
        for group in self._groups(""):
            limit, _, period = _read(group / "cpu.max").partition(" ")
            quotas.append(_share(limit, period))
        for group in self._groups("cpu"):
            quotas.append(_share(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")))
        return min((quota for quota in quotas if quota is not None), default=None)

    def oom_kills(self) -> int | None:
        """OOM kills in this process's own group; None if they are not counted."""
        counts = [_counted(group / "memory.events") for group in self._groups("")]
        counts += [_counted(group / "memory.oom_control") for group in self._groups("memory")]
        return next((count for count in [*counts, _counted(self.system)] if count is not None), None)

    def _groups(self, controller: str) -> Iterator[Path]:
        """Folders of the process's group and of all its ancestors. controller: `memory` or another one of version 1;
        empty: version 2, which has a single hierarchy.

        A container without a cgroup namespace reads the host's path but sees only its last folder, mounted as the root;
        missing folders are skipped."""
        for line in _read(self.membership).splitlines():
            names, _, path = line.partition(":")[2].partition(":")
            if not path or controller not in names.split(","):
                continue
            top = self.root / controller
            if not top.exists():  # mounted together with other controllers: `cpu,cpuacct`
                top = self.root / names
            here = top / path.strip("/")
            yield from (group for group in (here, *here.parents) if group.is_relative_to(top) and group.is_dir())

    def _numbers(self, controller: str, name: str) -> Iterator[int]:
        for group in self._groups(controller):
            if (text := _read(group / name)).isdecimal():  # version 2 writes "no limit" as "max"
                yield int(text)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # another version, a controller that is not mounted, or another system
        return ""


def _share(quota: str, period: str) -> float | None:
    """CPU time in cores; None for no limit, which is written as -1 or "max"."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _counted(file: Path) -> int | None:
    words = [line.split() for line in _read(file).splitlines()]
    return next((int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill"), None)
