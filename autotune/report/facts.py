"""A single trial as names and values."""

from rich.console import Group
from rich.table import Table

from autotune.config.candidate import Shape
from autotune.measure.types import TrialResult, cache_text
from autotune.report.table import cell, fmt, make_table
from autotune.units import format_bytes, format_duration


def trial_facts(result: TrialResult, shape: Shape) -> Group:
    """Result of one trial, and its peak memory by stage."""
    ci95 = "" if result.tokens_per_second_ci95 is None else f" ± {result.tokens_per_second_ci95:,.0f}"
    facts = {
        "model": f"{shape.size}, block size {shape.block_size}, "
        f"vocabulary {shape.vocab_size:,}, {shape.parameters:,} parameters",
        "status": result.status if result.status == "ok" else f"{result.status} in phase {result.phase}",
        "why": result.message,
        "tokens/s": fmt(result.tokens_per_second, ",.0f") + ci95,
        "MFU": fmt(result.mfu, ".1%"),
        "optimizer step": fmt(result.step_seconds_p50, ".4g", " s"),
        "first loss": fmt(result.first_loss, ".4f"),
        "build, compile": f"{format_duration(result.build_seconds)}, {format_duration(result.compile_seconds)}",
        "from compile cache": cache_text(result.compile_cache_hits, result.compile_cache_misses),
        "held by others": format_bytes(result.other_processes_bytes),
        "whole trial": format_duration(result.trial_seconds),
    }
    memory = [
        {
            "peak memory": stage,
            "allocated": format_bytes(view.allocated_bytes),
            "reserved": format_bytes(view.reserved_bytes),
            "device": format_bytes(view.device_bytes),
            "retries": fmt(view.num_alloc_retries, "d"),
        }
        for stage, view in result.memory.items()
    ]
    return Group(facts_table(facts), *([make_table(memory)] if memory else []))


def facts_table(facts: dict[str, str]) -> Table:
    """Names and values; empty values are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(cell(name), cell(value))
    return table
