"""One thing at a time, as names and values: above all a single trial."""

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from autotune.measure.types import TrialResult, cache_text
from autotune.units import format_bytes, format_duration


def trial_facts(result: TrialResult) -> Group:
    """What became of one trial, and its peak memory by stage."""
    ci95 = "" if result.tokens_per_second_ci95 is None else f" ± {result.tokens_per_second_ci95:,.0f}"
    facts = {
        "status": result.status if result.status == "ok" else f"{result.status} in phase {result.phase}",
        "why": result.message,
        "tokens/s": _number(result.tokens_per_second, ",.0f") + ci95,
        "MFU": _number(result.mfu, ".1%"),
        "optimizer step": _number(result.step_seconds_p50, ".4g", " s"),
        "first loss": _number(result.first_loss, ".4f"),
        "build, compile": f"{format_duration(result.build_seconds)}, {format_duration(result.compile_seconds)}",
        "from compile cache": cache_text(result.compile_cache_hits, result.compile_cache_misses),
        "held by others": format_bytes(result.other_processes_bytes),
        "whole trial": format_duration(result.trial_seconds),
    }
    memory = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("peak memory", "allocated", "reserved", "device", "retries"):
        memory.add_column(header, justify="left" if header == "peak memory" else "right")
    for stage, view in result.memory.items():
        sizes = (view.allocated_bytes, view.reserved_bytes, view.device_bytes)
        memory.add_row(stage, *map(format_bytes, sizes), _number(view.num_alloc_retries, "d"))
    return Group(facts_table(facts), *([memory] if result.memory else []))


def facts_table(facts: dict[str, str]) -> Table:
    """Names and the values that there are."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else format(value, spec) + unit
