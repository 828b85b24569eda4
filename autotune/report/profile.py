"""Where the memory of a step goes: tables, a timeline as CSV and PNG, and two candidates side by side."""

import csv
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from autotune.config.candidate import Candidate
from autotune.config.toml import read_candidate, write_atomically
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.measure.runner import run_profile
from autotune.measure.types import CATEGORIES, LiveTensor, MemoryProfile, TrialRequest
from autotune.units import GIB, MIB, format_bytes

_LINES = 3
"""How many of the lines fused into a kernel are shown."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A candidate and where its memory goes."""

    name: str
    candidate: Candidate
    profile: MemoryProfile
    directory: Path
    """Holds profile.json, timeline.csv, timeline.png, log.txt and, on CUDA, snapshot.pickle."""


def read_named(files: Sequence[Path], overrides: tuple[str, ...]) -> dict[str, Candidate]:
    """Candidate files, or the best.toml of run directories, by a name each; `overrides` as `--set` takes them.
    Raises ConfigError for a file that is not a candidate."""
    candidates = [read_candidate(file, overrides).candidate for file in files]
    return dict(zip(_names(files), candidates, strict=True))


def profile_candidates(named: Mapping[str, Candidate], *, out: Path, device: str) -> list[Profiled]:
    """Profile candidates one after another and write what was found: one into `out`, several into a folder of it
    each. Raises ConfigError for a folder that cannot be written, and AutotuneError for a candidate that does not
    run here, with the reason."""
    return [
        _profile(name, candidate, device, out if len(named) == 1 else out / name) for name, candidate in named.items()
    ]


def _names(files: Sequence[Path]) -> list[str]:
    """Of the file, or of its run; the second one of a name is called NAME-2."""
    plain = [file.stem if file.suffix == ".toml" and file.stem != "best" else _run_of(file).name for file in files]
    return [f"{name}-{seen}" if (seen := plain[: at + 1].count(name)) > 1 else name for at, name in enumerate(plain)]


def _run_of(file: Path) -> Path:
    return (file.parent if file.suffix == ".toml" else file).resolve()


def _profile(name: str, candidate: Candidate, device: str, directory: Path) -> Profiled:
    request = TrialRequest(candidate=candidate, device=device, result_path="")
    result, profile = run_profile(request, directory, directory / "log.txt")
    if profile is None:
        kind = UnsupportedError if result.status == "unsupported" else AutotuneError
        raise kind(f"{name}: {result.status} in phase {result.phase}: {result.message}")
    found = Profiled(name=name, candidate=candidate, profile=profile, directory=directory)
    try:
        write_atomically(directory / "timeline.csv", timeline_csv(profile))
        draw_timeline(profile).savefig(directory / "timeline.png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}; choose another with --out") from None
    return found


def profile_report(found: Profiled, top: int = 20) -> Group:
    """One candidate: the peak by category, and the largest of what was alive then."""
    profile = found.profile
    table = _table("at the peak", "bytes", "", "%")
    for category, count in _shown(profile):
        table.add_row(category, f"{count:,}", format_bytes(count), f"{count / profile.measured_peak_bytes:.1%}")
    table.add_section()
    for name, value in _views(profile).items():
        table.add_row(name, "-" if value is None else f"{value:,}", format_bytes(value), "")
    live = _table("count", "each", "category", "what or by what", "line", "made in", figures=2)
    live.columns[3].no_wrap, live.columns[3].max_width = True, 48
    for tensor, number in _grouped(profile)[:top]:
        cells = (tensor.category, _maker(tensor, number), _lines(tensor) or "-", tensor.phase or "before the step")
        live.add_row(str(number), format_bytes(tensor.bytes), *map(escape, cells))
    heading = f"{found.name}: {format_bytes(profile.measured_peak_bytes)} at the peak, which stands in {_peak(profile)}"
    return Group(Text(heading, style="bold"), table, live, Text(f"in {found.directory}: {_files(profile)}"))


def comparison(first: Profiled, second: Profiled) -> Group:
    """Two candidates: what differs, and what that saves where."""
    table = _table("at the peak", first.name, second.name, "difference")
    names = {category for one in (first, second) for category, _ in _shown(one.profile)}
    for category in (name for name in CATEGORIES if name in names):
        sizes = [one.profile.peak_bytes[category] for one in (first, second)]
        table.add_row(category, *map(format_bytes, sizes), _difference(*sizes))
    table.add_section()
    views = [_views(one.profile) for one in (first, second)]
    for name in views[0]:
        table.add_row(name, *(format_bytes(view[name]) for view in views), _difference(*(v[name] for v in views)))
    table.add_row("stands in", *(_peak(one.profile) for one in (first, second)), "")
    return Group(Text(f"{first.name} -> {second.name}: {_changes(first, second)}", style="bold"), table)


def timeline_csv(profile: MemoryProfile) -> str:
    """One line an allocation or release: seconds since the step's start, the phase, bytes by category."""
    columns = [f"{category.replace(' ', '_')}_bytes" for category in profile.timeline]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seconds", "phase", "allocated_bytes", *columns])
    for seconds, *counts in zip(profile.seconds, *profile.timeline.values(), strict=True):
        writer.writerow([f"{seconds:.9f}", _phase_at(profile, seconds), sum(counts), *counts])
    return text.getvalue()


def draw_timeline(profile: MemoryProfile) -> Figure:
    """Allocated bytes over the step, stacked by category, with the peak and the phases marked."""
    unit, name = (GIB, "GiB") if profile.measured_peak_bytes >= GIB else (MIB, "MiB")
    shown = {category: counts for category, counts in profile.timeline.items() if any(counts)}
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    heights = [[count / unit for count in counts] for counts in shown.values()]
    axes.stackplot(profile.seconds, *heights, labels=list(shown), step="post", lw=0)
    top = profile.measured_peak_bytes / unit
    for span in profile.spans:
        axes.axvline(span.begin_seconds, c="0.3", lw=0.8, ls=":")
        narrow = span.end_seconds - span.begin_seconds < 0.08 * profile.seconds[-1]
        place = ((span.begin_seconds + span.end_seconds) / 2, 1.24 * top)
        axes.text(*place, span.name, ha="center", va="top", fontsize="small", rotation=90 if narrow else 0)
    axes.plot([profile.peak_seconds], [top], "kv", ms=7)
    right = profile.peak_seconds > profile.seconds[-1] / 2  # then the label stands left of the mark
    axes.annotate(
        f"peak {top:.2f} {name}",
        (profile.peak_seconds, top),
        xytext=(-8 if right else 8, 4),
        textcoords="offset points",
        ha="right" if right else "left",
        fontweight="bold",
    )
    axes.set(xlabel="seconds (recording slows the step down)", ylabel=f"allocated ({name})", ylim=(0, 1.26 * top))
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    return figure


def _table(*headers: str, figures: int = 0) -> Table:
    """Figures stand right: the first `figures` columns, or all but the first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        right = index < figures if figures else index > 0
        table.add_column(header, justify="right" if right else "left")
    return table


def _shown(profile: MemoryProfile) -> list[tuple[str, int]]:
    """Categories with something in them; `unexplained` always."""
    return [(name, count) for name, count in profile.peak_bytes.items() if count or name == "unexplained"]


def _views(profile: MemoryProfile) -> dict[str, int | None]:
    device, allocated = profile.device_bytes, profile.measured_peak_bytes
    return {
        "allocated": allocated,
        "context and cache": None if device is None else device - allocated,
        "device": device,
    }


def _peak(profile: MemoryProfile) -> str:
    """`backward of micro step 2`"""
    kind, _, number = profile.peak_phase.partition(" ")
    return f"the {kind} of micro step {number}" if number.isdigit() else f"the {profile.peak_phase} step"


def _grouped(profile: MemoryProfile) -> list[tuple[LiveTensor, int]]:
    """Equal ones of all layers as one: same size, category, lines and phase. The largest groups first."""
    keys = [(t.bytes, t.category, t.lines, t.phase) for t in profile.live]
    counts = Counter(keys)
    first = dict(reversed(list(zip(keys, profile.live, strict=True))))
    return sorted(((first[key], number) for key, number in counts.items()), key=lambda g: -g[0].bytes * g[1])


def _lines(tensor: LiveTensor) -> str:
    """`model/gpt.py:46,62,34 and 2 more`"""
    places = [line.removeprefix("autotune/").partition(":") for line in tensor.lines]
    by_file = {file: [line for name, _, line in places[:_LINES] if name == file] for file, _, _ in places[:_LINES]}
    more = f" and {len(places) - _LINES} more" if len(places) > _LINES else ""
    return ", ".join(f"{file}:{','.join(lines)}" for file, lines in by_file.items()) + more


def _maker(tensor: LiveTensor, number: int) -> str:
    """What it is, where it has a name of its own; else what made it."""
    named = tensor.category in ("parameters", "optimizer state", "gradients", "batch")
    return tensor.name + (", ..." if number > 1 else "") if named else tensor.made_by or "-"


def _files(profile: MemoryProfile) -> str:
    snapshot = f", {profile.snapshot} (open it at pytorch.org/memory_viz)" if profile.snapshot else ""
    return f"timeline.png, timeline.csv, profile.json{snapshot}"


def _difference(first: int | None, second: int | None) -> str:
    if first is None or second is None:
        return "-"
    sign = "+" if second > first else "-" if second < first else ""
    return sign + format_bytes(abs(second - first))


def _changes(first: Profiled, second: Profiled) -> str:
    """`plan.loss full -> chunked`"""
    tables = [{"plan": asdict(one.candidate.plan), "model": asdict(one.candidate.shape)} for one in (first, second)]
    before, after = ({f"{t}.{key}": v for t, table in both.items() for key, v in table.items()} for both in tables)
    changed = [f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
    return ", ".join(changed) or "the same model and plan"


def _phase_at(profile: MemoryProfile, seconds: float) -> str:
    at = bisect_right([span.begin_seconds for span in profile.spans], seconds) - 1
    return profile.spans[at].name if at >= 0 and seconds <= profile.spans[at].end_seconds else ""
