"""What Linux control groups allow this process, in both of their versions, nested ones included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ControlGroups:
    """The groups that a process is in. Every limit on the way up to the root holds, so the smallest one counts."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")
    system: Path = Path("/proc/vmstat")
    """Counts the kernel's OOM kills of the whole machine, where no group does."""

    def memory_limit_bytes(self) -> int | None:
        """None: only the machine's memory is a limit."""
        found = [*self._numbers("", "memory.max"), *self._numbers("memory", "memory.limit_in_bytes")]
        # version 1 has no word for "no limit": it writes the largest multiple of a page
        return min((limit for limit in found if limit < 1 << 60), default=None)

    def cpu_quota(self) -> float | None:
        """Cores' worth of time; None: as much as the cores allow."""
        quotas = []
        for group in self._groups(""):
            limit, _, period = _read(group / "cpu.max").partition(" ")
            quotas.append(_share(limit, period))
        for group in self._groups("cpu"):
            quotas.append(_share(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")))
        return min((quota for quota in quotas if quota is not None), default=None)

    def oom_kills(self) -> int | None:
        """Processes that the kernel has killed for memory in this process's own group; None where nobody counts."""
        counts = [_counted(group / "memory.events") for group in self._groups("")]
        counts += [_counted(group / "memory.oom_control") for group in self._groups("memory")]
        return next((count for count in [*counts, _counted(self.system)] if count is not None), None)

    def _groups(self, controller: str) -> Iterator[Path]:
        """Folders of the group that the process is in and of all above it. controller: one of version 1, `memory`;
        empty: version 2, which has one hierarchy for all.

        A container without a name space of its own reads the host's path, of which it sees only the last folder,
        mounted as the root: folders that do not exist are left out."""
        for line in _read(self.membership).splitlines():
            names, _, path = line.partition(":")[2].partition(":")
            if not path or controller not in names.split(","):
                continue
            top = self.root / controller
            if not top.exists():  # mounted together with others, as `cpu,cpuacct`
                top = self.root / names
            here = top / path.strip("/")
            yield from (group for group in (here, *here.parents) if group.is_relative_to(top) and group.is_dir())

    def _numbers(self, controller: str, name: str) -> Iterator[int]:
        for group in self._groups(controller):
            if (text := _read(group / name)).isdecimal():  # version 2 writes "max" for no limit
                yield int(text)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # another version, a controller that is not mounted, or another system
        return ""


def _share(quota: str, period: str) -> float | None:
    """-1 and "max" mean no limit."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _counted(file: Path) -> int | None:
    words = [line.split() for line in _read(file).splitlines()]
    return next((int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill"), None)
