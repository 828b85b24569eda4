"""What is searched, as plain data: names and choices; and the way from chosen values to a candidate.

Values that execute the same step become the same candidate, so that nothing is measured twice.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from autotune.config.candidate import Candidate, Plan, Recipe, Shape, one_of
from autotune.config.presets import guide_row
from autotune.config.search import SearchSettings
from autotune.environment import Environment
from autotune.kernels import registry

Value = str | int
Values = Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One thing that is searched."""

    name: str
    """A field of the plan or the shape, or `head_size`."""
    choices: tuple[Value, ...]
    """At least two, or the one that the user allows; numbers in ascending order."""

    @property
    def ordered(self) -> bool:
        """Neighbours are alike: the sampler may interpolate."""
        return isinstance(self.choices[0], int)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All that one search may try."""

    dimensions: tuple[Dimension, ...]
    recipe: Recipe
    """Shape and batch, where they are not searched."""
    plan: Plan
    """The baseline's; holds for everything that has only one choice."""

    @property
    def size(self) -> int:
        """Combinations of choices; several may be the same candidate."""
        return math.prod(len(dimension.choices) for dimension in self.dimensions)


# Wide enough to hold the optimum of an hour to a month on one card: 10M to 500M parameters.
_CUDA_SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("n_layer", (6, 8, 10, 12, 16, 20, 24)),
    ("n_embd", (384, 512, 640, 768, 896, 1024, 1280)),
    ("head_size", (64, 128)),
    ("block_size", (512, 1024)),
)
# What two cores train in minutes.
_CPU_SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("n_layer", (2, 3, 4, 6)),
    ("n_embd", (64, 128, 192, 256, 384)),
    ("head_size", (32, 64)),
    ("block_size", (64, 128, 256)),
)


# From all in memory to all computed again; a budget in between is one that Inductor's partitioner fills.
_CUDA_RECOMPUTE = ("none", "selective", "budget_0.5", "every_2", "block")


def build_space(settings: SearchSettings, environment: Environment) -> Space:
    """Everything that `environment` can run, the baseline's own values included; of what `settings.choices` names,
    only those. Raises ConfigError for choices that there are not."""
    recipe, baseline = settings.recipe, settings.baseline
    on_cuda = machine_of(environment).device == "cuda"
    blocks: tuple[int, ...] = (recipe.shape.block_size,)
    found: list[tuple[str, tuple[Value, ...]]] = []
    if settings.search_shape:
        for name, choices in _CUDA_SHAPES if on_cuda else _CPU_SHAPES:
            if name == "block_size":  # the tokens of a step must stay the same
                choices = blocks = tuple(block for block in choices if recipe.tokens_per_step % block == 0)
            found.append((name, choices))
    largest = max(recipe.tokens_per_step // block for block in blocks)
    found.append(("micro_batch_size", _micro_batches(largest)))
    found.extend(_kernel_choices(environment, recipe.shape))
    found.append(("loss_chunk_tokens", (512, 1024, 2048, 4096, 8192) if on_cuda else (128, 256, 512, 1024)))
    found.append(("activation_checkpointing", _CUDA_RECOMPUTE if on_cuda else ("none", "block", "selective")))
    found.append(("compile", ("off", "full", "block")))
    found.append(("dtype", _dtypes(environment)))
    found.append(("allocator", ("default", "expandable_segments") if on_cuda else ("default",)))
    dimensions = [Dimension(name=name, choices=_with_baseline(name, choices, baseline)) for name, choices in found]
    kept = (_allowed(dimension, settings.choices) for dimension in dimensions)
    several = tuple(dimension for dimension in kept if len(dimension.choices) > 1 or dimension.name in settings.choices)
    for name in settings.choices:
        one_of("--choices", name, tuple(dimension.name for dimension in dimensions))
    return Space(dimensions=several, recipe=recipe, plan=baseline)


def _allowed(dimension: Dimension, choices: Mapping[str, tuple[str, ...]]) -> Dimension:
    name, known = dimension.name, {str(choice): choice for choice in dimension.choices}
    for word in choices.get(name, ()):
        one_of(f"--choices {name}", word, tuple(known))
    return replace(dimension, choices=tuple(known[word] for word in known if word in choices.get(name, known)))


def machine_of(environment: Environment) -> registry.Machine:
    """What kernels are checked against."""
    return registry.machine(environment.device, environment.capability, environment.torch)


def _micro_batches(largest: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... `largest`: the fastest is often no power of two."""
    ladder = {step << power for power in range(largest.bit_length()) for step in (1, 3)}
    return tuple(sorted({size for size in ladder if size < largest} | {largest}))


def _dtypes(environment: Environment) -> tuple[str, ...]:
    """Tensor cores before capability 8 know float16 only; above it bfloat16 is as fast and needs no loss scaling."""
    machine = machine_of(environment)
    if machine.device == "cpu":
        return ("float32", "bfloat16")
    return ("bfloat16",) if machine.capability >= (8, 0) else ("float16",)


def _kernel_choices(environment: Environment, shape: Shape) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rows worth searching that run in every dtype of the search. Searched head sizes suit them all."""
    machine = machine_of(environment)

    def usable(row: registry.Kernel) -> bool:
        return machine.device in row.searched and not any(
            registry.why_unavailable(row, machine, dtype=dtype, head_size=shape.head_size, dropout=shape.dropout)
            for dtype in _dtypes(environment)
        )

    for operation in ("attention", "loss"):
        yield operation, tuple(row.name for row in registry.kernels(operation) if usable(row))


def _with_baseline(name: str, choices: tuple[Value, ...], baseline: Plan) -> tuple[Value, ...]:
    own: Value | None = getattr(baseline, name, None)
    if own is None or own in choices:
        return choices
    return tuple(sorted((*choices, own))) if isinstance(own, int) else (*choices, own)


def candidate_at(space: Space, values: Values) -> Candidate:
    """The candidate of `values` (a choice for each dimension), in its canonical form."""
    shape, plan = {**vars(space.recipe.shape)}, {**vars(space.plan)}  # asdict would take most of a search's own time
    for name, value in values.items():
        if name in plan:
            plan[name] = value
        elif name != "head_size":
            shape[name] = value
    if "head_size" in values:
        shape["n_head"] = shape["n_embd"] // int(values["head_size"])
    rows = (registry.find("attention", plan["attention"]), registry.find("loss", plan["loss"]))
    compiles = next((dimension.choices for dimension in space.dimensions if dimension.name == "compile"), ())
    if plan["compile"] == "off" and "full" in compiles and any(row.compiled_only for row in rows):
        plan["compile"] = "full"
    sequences = space.recipe.tokens_per_step // shape["block_size"]
    plan["micro_batch_size"] = min(plan["micro_batch_size"], sequences)
    recipe = replace(space.recipe, shape=type(space.recipe.shape)(**shape), global_batch_size=sequences)
    return canonical(Candidate(recipe=recipe, plan=Plan(**plan)))


def canonical(candidate: Candidate) -> Candidate:
    """The simplest candidate that executes the same step.

    A micro batch larger than its share of the global batch would only add padding to the last one: with 64
    sequences, 48 and 32 both take two micro steps, so 48 becomes 32. A chunk larger than the micro batch is
    the micro batch, and losses that have no chunks do not read its size at all. Without compilation there are
    no graphs to have a memory budget.
    """
    plan, sequences = candidate.plan, candidate.recipe.global_batch_size
    micro = -(-sequences // candidate.gradient_accumulation_steps)
    chunk = min(plan.loss_chunk_tokens, micro * candidate.shape.block_size)
    if not reads_chunks(plan):
        chunk = Plan().loss_chunk_tokens
    recompute = plan.activation_checkpointing
    if plan.compile == "off" and plan.memory_budget is not None:
        recompute = "none"
    plan = replace(plan, micro_batch_size=micro, loss_chunk_tokens=chunk, activation_checkpointing=recompute)
    return replace(candidate, plan=plan)


def reads_chunks(plan: Plan) -> bool:
    """Whether the plan's loss goes chunk by chunk."""
    return registry.find("loss", plan.loss).chunked


def values_of(space: Space, candidate: Candidate) -> dict[str, Value]:
    """Where the sampler files what was measured of `candidate`. Numbers go to the next choice above, which
    leads back to the same candidate if it is the canonical form of one in the space; the guide's width of 672,
    which is not, is filed under 768."""
    values: dict[str, Value] = {}
    for dimension in space.dimensions:
        name, choices = dimension.name, dimension.choices
        own: Value = getattr(candidate.plan if hasattr(candidate.plan, name) else candidate.shape, name)
        if isinstance(own, int):
            values[name] = next((choice for choice in choices if int(choice) >= own), choices[-1])
        else:
            values[name] = own if own in choices else choices[0]
    return values


def every_value(space: Space) -> Iterator[dict[str, Value]]:
    """All combinations of choices, the last dimension fastest."""
    names = [dimension.name for dimension in space.dimensions]
    for choice in itertools.product(*(dimension.choices for dimension in space.dimensions)):
        yield dict(zip(names, choice, strict=True))


@functools.lru_cache(maxsize=1)
def every_candidate(space: Space) -> Mapping[str, Candidate]:
    """Each candidate of a small space once, by its id."""
    return {candidate.id: candidate for values in every_value(space) for candidate in [candidate_at(space, values)]}


def baseline(settings: SearchSettings) -> Candidate:
    """Trial 0: the user's own way, or plain nanoGPT's, exactly as it stands (not canonical)."""
    return Candidate(recipe=settings.recipe, plan=settings.baseline)


def guide_candidate(settings: SearchSettings, environment: Environment) -> Candidate | None:
    """What the guide advises for this much memory, over the same tokens a step; None where shapes are not
    searched, or on the CPU, for which it has no advice."""
    if not settings.search_shape or machine_of(environment).device != "cuda":
        return None
    row = guide_row(environment.device_memory_bytes)
    shape = replace(row.shape, vocab_size=settings.recipe.shape.vocab_size)
    sequences = settings.recipe.tokens_per_step // shape.block_size
    plan = replace(settings.baseline, micro_batch_size=min(row.micro_batch_size, sequences))
    return Candidate(recipe=replace(settings.recipe, shape=shape, global_batch_size=sequences), plan=plan)


def in_words(candidate: Candidate) -> str:
    """A candidate on one line: shape, micro batch and how it runs."""
    shape, plan = candidate.shape, candidate.plan
    chunk = plan.loss_chunk_tokens if reads_chunks(plan) else None
    words = [
        f"{shape.n_layer}x{shape.n_head}x{shape.n_embd} block {shape.block_size}",
        f"micro batch {plan.micro_batch_size} x {candidate.gradient_accumulation_steps}",
        plan.dtype,
        "eager" if plan.compile == "off" else f"compile {plan.compile}",
        plan.attention,
        f"{plan.loss} loss" if chunk is None else f"{plan.loss} loss by {chunk}",
    ]
    if plan.activation_checkpointing != "none":
        words.append(f"recompute {plan.activation_checkpointing}")
    if candidate.recipe.optimizer != "adamw":
        words.append(candidate.recipe.optimizer)
    if plan.allocator != "default":
        words.append(plan.allocator)
    return ", ".join(words)


def describe_space(space: Space) -> str:
    """One line a dimension, and the size: what `--dry-run` prints."""
    width = max(len(dimension.name) for dimension in space.dimensions)
    lines = [f"{d.name:<{width}}  {', '.join(map(str, d.choices))}" for d in space.dimensions]
    return "\n".join([*lines, f"{space.size:,} combinations"])
