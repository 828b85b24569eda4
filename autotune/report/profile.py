"""Memory profile of a step: tables, a timeline as CSV and PNG, and two candidates side by side."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group

from autotune.config.candidate import Candidate
from autotune.config.toml import BEST_TOML, read_candidate
from autotune.errors import AutotuneError, ConfigError, UnsupportedError
from autotune.files import write_atomically
from autotune.measure.runner import run_profile
from autotune.measure.types import CATEGORIES, LiveTensor, MemoryProfile, TrialRequest
from autotune.report.table import Prose, make_table
from autotune.units import GIB, MIB, format_bytes

_LINES = 3
"""Lines shown of those fused into one kernel."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A candidate and the memory profile of its step."""

    name: str
    candidate: Candidate
    profile: MemoryProfile
    directory: Path
    """Directory with profile.json, timeline.csv, timeline.png, log.txt and, on CUDA, snapshot.pickle."""


def read_named(files: Sequence[Path], overrides: tuple[str, ...]) -> dict[str, Candidate]:
    """Candidates of files or run directories, by a unique name each; `overrides` have the syntax of `--set`. Raises
    ConfigError for a file that is not a candidate."""
    candidates = [read_candidate(file, overrides).candidate for file in files]
    return dict(zip(_names(files), candidates, strict=True))


def profile_candidates(named: Mapping[str, Candidate], *, out: Path, device: str) -> list[Profiled]:
    """Profile candidates one after another. A single one is written into `out`, several into a subfolder each. Raises
    ConfigError for a folder that cannot be written, and AutotuneError with the reason for a candidate that does not
    run here."""
    profiled = []
    for name, candidate in named.items():
        directory = out if len(named) == 1 else out / name
        request = TrialRequest(candidate=candidate, device=device, result_path="")
        result, profile = run_profile(request, directory, directory / "log.txt")
        if profile is None:
            kind = UnsupportedError if result.status == "unsupported" else AutotuneError
            raise kind(f"{name}: {result.status} in phase {result.phase}: {result.message}")
        try:
            write_atomically(directory / "timeline.csv", timeline_csv(profile))
            draw_timeline(profile).savefig(directory / "timeline.png", dpi=120)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error.strerror}; choose another with --out") from None
        profiled.append(Profiled(name=name, candidate=candidate, profile=profile, directory=directory))
    return profiled


def _names(files: Sequence[Path]) -> list[str]:
    """Name of each file or its run; the second of the same name becomes NAME-2."""
    runs = [file.parent if file.name == BEST_TOML else file for file in files]
    names = [run.stem if run.suffix == ".toml" else run.resolve().name for run in runs]
    return [f"{name}-{seen}" if (seen := names[: at + 1].count(name)) > 1 else name for at, name in enumerate(names)]


def profile_report(profiled: Profiled, top: int = 20) -> Group:
    """One candidate: bytes at the peak by category, and the `top` largest groups of tensors alive then."""
    profile = profiled.profile
    peak = profile.measured_peak_bytes
    sizes = [
        {
            "at the peak": name,
            "bytes": "-" if count is None else f"{count:,}",
            "size": format_bytes(count),
            "share": f"{count / peak:.1%}" if count is not None and name in CATEGORIES else "",
        }
        for name, count in _sizes(profile).items()
    ]
    live = [
        {
            "count": str(len(equal)),
            "each": format_bytes(equal[0].bytes),
            "category": equal[0].category,
            "what or by what": _maker(equal),
            "line": _lines(equal[0]) or "-",
            "made in": equal[0].phase or "before the step",
        }
        for equal in _grouped(profile)[:top]
    ]
    heading = f"{profiled.name}: {format_bytes(peak)} at the peak, which is reached in: {profile.peak_phase}"
    snapshot = f", {profile.snapshot} (open it at pytorch.org/memory_viz)" if profile.snapshot else ""
    return Group(
        Prose(heading, "bold"),
        make_table(sizes, figures=("bytes", "size", "share")),
        make_table(live, figures=("count", "each")),
        Prose(f"in {profiled.directory}: timeline.png, timeline.csv, profile.json{snapshot}"),
    )


def as_json(profiled: Profiled) -> dict[str, Any]:
    """The profile in bytes and seconds, without the timeline, which timeline.csv holds."""
    profile = asdict(replace(profiled.profile, seconds=(), timeline={}))
    del profile["seconds"], profile["timeline"]
    return {
        "name": profiled.name,
        "directory": str(profiled.directory),
        "candidate": asdict(profiled.candidate),
        **profile,
    }


def comparison(first: Profiled, second: Profiled) -> Group:
    """Two candidates: their differences, and the bytes that these save by category."""
    before, after = _sizes(first.profile), _sizes(second.profile)
    lines = []
    for name in sorted({**before, **after}, key=_ORDER.index):
        old, new = before.get(name, 0), after.get(name, 0)
        sizes = {first.name: format_bytes(old), second.name: format_bytes(new)}
        lines.append({"at the peak": name, **sizes, "difference": _difference(old, new)})
    peaks = {one.name: one.profile.peak_phase for one in (first, second)}
    lines.append({"at the peak": "reached in", **peaks, "difference": ""})
    return Group(
        Prose(f"{first.name} -> {second.name}: {_changes(first.candidate, second.candidate)}", "bold"),
        make_table(lines, figures=(first.name, second.name, "difference")),
    )


def timeline_csv(profile: MemoryProfile) -> str:
    """One line per allocation or release: seconds since the start of the step, phase, bytes by category."""
    columns = {
        "seconds": profile.seconds,
        "phase": [_phase_at(profile, seconds) for seconds in profile.seconds],
        "allocated_bytes": [sum(counts) for counts in zip(*profile.timeline.values(), strict=True)],
        **{f"{category.replace(' ', '_')}_bytes": counts for category, counts in profile.timeline.items()},
    }
    return pd.DataFrame(columns).to_csv(index=False, float_format="%.9f", lineterminator="\n")


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
    axes.text(profile.peak_seconds, 1.02 * top, f"peak {top:.2f} {name}", ha="center", fontweight="bold")
    axes.set(xlabel="seconds (recording slows the step down)", ylabel=f"allocated ({name})", ylim=(0, 1.26 * top))
    axes.margins(x=0)
    figure.legend(loc="outside right upper", fontsize="small", reverse=True)
    return figure


_ORDER = (*CATEGORIES, "allocated", "context and cache", "device")


def _sizes(profile: MemoryProfile) -> dict[str, int | None]:
    """Non-empty categories (`unexplained` always), then the totals: allocated, context and cache, device."""
    device, allocated = profile.device_bytes, profile.measured_peak_bytes
    held = {name: count for name, count in profile.peak_bytes.items() if count or name == "unexplained"}
    cache = None if device is None else device - allocated
    return {**held, "allocated": allocated, "context and cache": cache, "device": device}


def _grouped(profile: MemoryProfile) -> list[list[LiveTensor]]:
    """Tensors of the same size, category, lines and phase, across layers; largest group first."""
    groups: dict[object, list[LiveTensor]] = defaultdict(list)
    for tensor in profile.live:
        groups[tensor.bytes, tensor.category, tensor.lines, tensor.phase].append(tensor)
    return sorted(groups.values(), key=lambda equal: -equal[0].bytes * len(equal))


def _lines(tensor: LiveTensor) -> str:
    """`model/gpt.py:46, model/gpt.py:62, model/gpt.py:34 and 2 more`"""
    more = f" and {len(tensor.lines) - _LINES} more" if len(tensor.lines) > _LINES else ""
    return ", ".join(line.removeprefix("autotune/") for line in tensor.lines[:_LINES]) + more


def _maker(equal: Sequence[LiveTensor]) -> str:
    """Name of the tensors if they have one, else the operator that made them."""
    if equal[0].category in ("parameters", "optimizer state", "gradients", "batch"):
        return equal[0].name + (", ..." if len(equal) > 1 else "")
    return equal[0].made_by or "-"


def _difference(first: int | None, second: int | None) -> str:
    if first is None or second is None:
        return "-"
    return ("+" if second > first else "") + format_bytes(second - first)


def _changes(first: Candidate, second: Candidate) -> str:
    """`loss full -> chunked`"""
    before, after = ({**asdict(one.plan), **asdict(one.shape)} for one in (first, second))
    changed = [f"{key} {value} -> {after[key]}" for key, value in before.items() if value != after[key]]
    return ", ".join(changed) or "the same model and plan"


def _phase_at(profile: MemoryProfile, seconds: float) -> str | None:
    """Phase at that time; the later one if one ends as the next begins."""
    inside = [span.name for span in profile.spans if span.begin_seconds <= seconds <= span.end_seconds]
    return inside[-1] if inside else None
