"""The search space as plain data, the candidate of given values, and Optuna's parameters of a candidate.

Values that execute the same step become the same candidate, so that nothing is measured twice.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autotune.config.candidate import Candidate, DType, Plan, Recipe, Shape, Sharding, one_of
from autotune.config.presets import guide_row
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.errors import ConfigError, shown
from autotune.kernels import registry

if TYPE_CHECKING:  # importing optuna takes a quarter of a second; only a search pays it
    from optuna.distributions import BaseDistribution

Value = str | int


@dataclass(frozen=True, kw_only=True, eq=False)  # hashed by identity, for `every_candidate`
class Space:
    """Everything that one search may try."""

    choices: Mapping[str, tuple[Value, ...]]
    """Choices by field of the plan or the shape, and of `head_size`: at least two, or the one that the user allows.
    Numbers are in ascending order."""
    recipe: Recipe
    """Shape and batch where they are not searched."""
    plan: Plan
    """The baseline's plan; it holds for everything that has only one choice."""

    @property
    def size(self) -> int:
        """Number of combinations; several may be the same candidate."""
        return math.prod(map(len, self.choices.values()))


def ordered(choices: tuple[Value, ...]) -> bool:
    """Whether the choices are numbers, so that neighbours are similar."""
    return isinstance(choices[0], int)


# Wide enough to hold the optimum of an hour to a month on one card: 10M to 500M parameters.
_CUDA_SHAPES: Mapping[str, tuple[int, ...]] = {
    "n_layer": (6, 8, 10, 12, 16, 20, 24),
    "n_embd": (384, 512, 640, 768, 896, 1024, 1280),
    "head_size": (64, 128),
    "block_size": (512, 1024),
}
# What two cores train in minutes.
_CPU_SHAPES: Mapping[str, tuple[int, ...]] = {
    "n_layer": (2, 3, 4, 6),
    "n_embd": (64, 128, 192, 256, 384),
    "head_size": (32, 64),
    "block_size": (64, 128, 256),
}


# From keeping all activations to recomputing all; Inductor's partitioner fills a budget in between.
_CUDA_RECOMPUTE = ("none", "selective", "budget_0.5", "every_2", "block")


def build_space(settings: SearchSettings, environment: Environment) -> Space:
    """Everything that `environment` can run, the baseline's values included, restricted to `settings.choices`.
    Raises ConfigError for unknown choices."""
    recipe, machine = settings.recipe, _machine(environment)
    on_cuda = machine.device == "cuda"
    shapes: dict[str, tuple[int, ...]] = {}
    if settings.search_shape:
        shapes |= _CUDA_SHAPES if on_cuda else _CPU_SHAPES
        # the tokens of a step must stay the same
        shapes["block_size"] = tuple(block for block in shapes["block_size"] if recipe.tokens_per_step % block == 0)
    shortest = min(shapes.get("block_size", (recipe.shape.block_size,)))
    processes = settings.baseline.processes
    every: dict[str, tuple[Value, ...]] = {
        **shapes,
        "micro_batch_size": _micro_batches(-(-recipe.tokens_per_step // shortest // processes)),
        "attention": _kernels("attention", machine, recipe.shape),
        "loss": tuple(
            name for name in _kernels("loss", machine, recipe.shape) if processes == 1 or name != "auto_chunker"
        ),
        "loss_chunk_tokens": (1024, 2048, 4096, 8192, 16384) if on_cuda else (128, 256, 512, 1024),
        "activation_checkpointing": _CUDA_RECOMPUTE if on_cuda else ("none", "block", "selective"),
        "compile": ("off", "full", "block"),
        "dtype": _dtypes(machine),
        "allocator": ("default", "expandable_segments") if on_cuda else ("default",),
        "processes": (processes,),
        "sharding": _shardings(machine, settings),
    }
    if "dtype" not in settings.choices:
        every["dtype"] = tuple(dtype for dtype in every["dtype"] if dtype != environment.emulated)
    every = {name: _with_baseline(name, choices, settings.baseline) for name, choices in every.items()}
    for name, words in settings.choices.items():
        one_of("--choices", name, tuple(every))
        known = tuple(map(str, every[name]))
        for word in words:
            if word not in known:
                raise ConfigError(
                    f"--choices {name} = {shown(word)} is not among what is searched here; choose from "
                    f"{', '.join(known)}"
                )
        every[name] = tuple(choice for choice in every[name] if str(choice) in words)
    several = {name: choices for name, choices in every.items() if len(choices) > 1 or name in settings.choices}
    return Space(choices=several, recipe=recipe, plan=settings.baseline)


def _machine(environment: Environment) -> registry.Machine:
    """The machine that kernels are checked against."""
    return registry.machine(environment.device, environment.capability, environment.torch)


def _micro_batches(largest: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... `largest`: the fastest is often no power of two."""
    ladder = {step << power for power in range(largest.bit_length()) for step in (1, 3)}
    return tuple(sorted({size for size in ladder if size < largest} | {largest}))


def _shardings(machine: registry.Machine, settings: SearchSettings) -> tuple[Sharding, ...]:
    """What several processes may divide. Raises ConfigError for a choice where there is one."""
    asked = [word for word in settings.choices.get("sharding", ()) if word != "none"]
    if settings.baseline.processes == 1:
        if asked:
            raise ConfigError(f"--choices sharding={asked[0]} divides among processes; add for example --nproc 2")
        return ("none",)
    undivided = settings.recipe.optimizer == "adamw_8bit" or "float16" in _dtypes(machine)
    return ("none",) if undivided else ("none", "optimizer", "full")


def _dtypes(machine: registry.Machine) -> tuple[DType, ...]:
    """Tensor cores before capability 8 support float16 only; later ones bfloat16, as fast and without loss scaling."""
    if machine.device == "cpu":
        return ("float32", "bfloat16")
    return ("bfloat16", "bfloat16_residual") if machine.capability >= (8, 0) else ("float16",)


def _kernels(operation: registry.Operation, machine: registry.Machine, shape: Shape) -> tuple[str, ...]:
    """Rows worth searching that run in every dtype of the search. All of them support the searched head sizes."""
    dtypes = {Plan(dtype=dtype).matrix_dtype for dtype in _dtypes(machine)}

    def usable(row: registry.Kernel) -> bool:
        return machine.device in row.searched and not any(
            registry.why_unavailable(row, machine, dtype=dtype, head_size=shape.head_size, dropout=shape.dropout)
            for dtype in dtypes
        )

    return tuple(row.name for row in registry.kernels(operation) if usable(row))


def _with_baseline(name: str, choices: tuple[Value, ...], baseline: Plan) -> tuple[Value, ...]:
    own: Value | None = getattr(baseline, name, None)
    if own is None or own in choices:
        return choices
    return tuple(sorted((*choices, own))) if isinstance(own, int) else (*choices, own)


def candidate_at(space: Space, values: Mapping[str, Value]) -> Candidate:
    """The candidate of `values`, one for each name of the space, in its canonical form."""
    shape, plan = {**vars(space.recipe.shape)}, {**vars(space.plan)}  # asdict is slow
    for name, value in values.items():
        if name in plan:
            plan[name] = value
        elif name != "head_size":
            shape[name] = value
    if "head_size" in values:
        shape["n_head"] = shape["n_embd"] // int(values["head_size"])
    rows = (registry.find("attention", plan["attention"]), registry.find("loss", plan["loss"]))
    if plan["compile"] == "off" and "full" in space.choices.get("compile", ()) and any(r.compiled_only for r in rows):
        plan["compile"] = "full"
    if plan["sharding"] == "full" and plan["compile"] == "full" and "block" in space.choices.get("compile", ()):
        plan["compile"] = "block"  # it gathers block by block, outside of compiled graphs
    recipe = _recipe_of(space, tuple(shape.items()))
    plan["micro_batch_size"] = min(plan["micro_batch_size"], recipe.global_batch_size)
    return Candidate(recipe=recipe, plan=Plan(**{**plan, **_simplest(plan, recipe)}))


@functools.lru_cache(maxsize=1024)
def _recipe_of(space: Space, shape: tuple[tuple[str, Any], ...]) -> Recipe:
    """The space's recipe with that shape and as many tokens a step."""
    own = Shape(**dict(shape))
    return replace(space.recipe, shape=own, global_batch_size=space.recipe.tokens_per_step // own.block_size)


def canonical(candidate: Candidate) -> Candidate:
    """The simplest candidate that executes the same step.

    A micro batch larger than its share of a process's sequences only pads the last one: with 64 sequences, 48 and 32
    both take two micro steps, so 48 becomes 32. A chunk larger than the micro batch is the micro batch; losses without
    chunks do not read its size. Without compilation there are no graphs to have a memory budget.
    """
    return replace(candidate, plan=replace(candidate.plan, **_simplest(vars(candidate.plan), candidate.recipe)))


def _simplest(plan: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The fields of `plan` in which the canonical form may differ."""
    sequences = -(-recipe.global_batch_size // plan["processes"])
    micro = -(-sequences // -(-sequences // plan["micro_batch_size"]))
    chunk = min(plan["loss_chunk_tokens"], micro * recipe.shape.block_size)
    if not registry.find("loss", plan["loss"]).chunked:
        chunk = Plan.loss_chunk_tokens
    recompute = plan["activation_checkpointing"]
    if plan["compile"] == "off" and recompute.startswith("budget_"):
        recompute = "none"
    return {"micro_batch_size": micro, "loss_chunk_tokens": chunk, "activation_checkpointing": recompute}


def reads_chunks(plan: Plan) -> bool:
    """Whether the plan's loss computes logits chunk by chunk."""
    return registry.find("loss", plan.loss).chunked


def values_of(space: Space, candidate: Candidate) -> dict[str, Value]:
    """The choices nearest to a candidate. A number becomes the next larger choice, which leads back to the same
    candidate where that is the canonical form of one in the space; a width of 672, which is not, becomes 768."""
    values: dict[str, Value] = {}
    for name, choices in space.choices.items():
        value = _value(candidate, name)
        if isinstance(value, int):
            values[name] = next((choice for choice in choices if int(choice) >= value), choices[-1])
        else:
            values[name] = value if value in choices else choices[0]
    return values


def _value(candidate: Candidate, name: str) -> Value:
    value: Value = getattr(candidate.plan if hasattr(candidate.plan, name) else candidate.shape, name)
    return value


def snapped(space: Space, values: Mapping[str, Any]) -> dict[str, Value]:
    """`values` moved to the nearest choices, numbers on a log scale."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        choices = space.choices[name]
        if ordered(choices):
            found[name] = min(choices, key=lambda choice: abs(math.log(int(choice) / value)))
        else:
            found[name] = value if value in choices else choices[0]
    return found


def distributions(space: Space, *others: Candidate) -> "dict[str, BaseDistribution]":
    """Optuna's distributions: a range of integers on a log scale, or a category. They hold the choices, the canonical
    forms of these, and the values of `others`, which are measured although they may lie outside the choices."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    corners = [{name: choices[end] for name, choices in space.choices.items()} for end in (0, -1)]
    ends = [{**corner, name: v} for corner in corners for name, choices in space.choices.items() for v in choices]
    probes = [candidate_at(space, values) for values in ends]
    found: dict[str, BaseDistribution] = {}
    for name, choices in space.choices.items():
        values = dict.fromkeys([*choices, *(_value(candidate, name) for candidate in (*others, *probes))])
        if ordered(choices):
            found[name] = IntDistribution(min(map(int, values)), max(map(int, values)), log=True)
        else:
            found[name] = CategoricalDistribution(tuple(map(str, values)))
    return found


def parameters_of(
    space: Space, candidate: Candidate, kinds: "Mapping[str, BaseDistribution]"
) -> dict[str, Value]:
    """Optuna's parameters of a candidate: its own values, or the nearest choice where a distribution lacks one."""
    near, parameters = values_of(space, candidate), dict[str, Value]()
    for name, kind in kinds.items():
        value = _value(candidate, name)
        parameters[name] = value if contains(kind, value) else near[name]
    return parameters


def contains(kind: "BaseDistribution", value: object) -> bool:
    """Whether a value lies in a distribution made by `distributions`."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    assert isinstance(kind, IntDistribution)
    return isinstance(value, int | float) and kind.low <= value <= kind.high


def every_value(space: Space) -> Iterator[dict[str, Value]]:
    """All combinations of choices; the last name varies fastest."""
    for combination in itertools.product(*space.choices.values()):
        yield dict(zip(space.choices, combination, strict=True))


@functools.lru_cache(maxsize=1)
def every_candidate(space: Space) -> Mapping[str, Candidate]:
    """Each candidate of a small space once, by its id."""
    return {candidate.id: candidate for values in every_value(space) for candidate in [candidate_at(space, values)]}


def baseline(settings: SearchSettings) -> Candidate:
    """Trial 0: the user's configuration or plain nanoGPT's, unchanged (not canonical)."""
    return Candidate(recipe=settings.recipe, plan=settings.baseline)


def guide_candidate(settings: SearchSettings, environment: Environment) -> Candidate | None:
    """The guide's advice for this much memory, with the same tokens a step; None where shapes are not searched, and on
    the CPU, for which the guide has no row."""
    if not settings.search_shape or _machine(environment).device != "cuda":
        return None
    row = guide_row(environment.device_memory_bytes)
    shape = replace(row.shape, vocab_size=settings.recipe.shape.vocab_size)
    sequences = settings.recipe.tokens_per_step // shape.block_size
    plan = replace(settings.baseline, micro_batch_size=min(row.micro_batch_size, sequences))
    return Candidate(recipe=replace(settings.recipe, shape=shape, global_batch_size=sequences), plan=plan)


_DEFAULT = Plan()
_IN_WORDS = (
    "micro_batch_size", "dtype", "compile", "attention", "loss", "loss_chunk_tokens", "activation_checkpointing",
)  # fmt: skip
"""Fields of the plan that `in_words` formats itself."""


def in_words(candidate: Candidate) -> str:
    """A candidate on one line: shape, micro batch, plan."""
    return f"{shape_in_words(candidate.shape)}, {plan_in_words(candidate)}"


def shape_in_words(shape: Shape) -> str:
    vocabulary = "" if shape.vocab_size == Shape().vocab_size else f" vocab {shape.vocab_size}"
    return f"{shape.size} block {shape.block_size}{vocabulary}"


def plan_in_words(candidate: Candidate) -> str:
    """How a candidate is executed, on one line."""
    plan = candidate.plan
    words = [
        f"micro batch {plan.micro_batch_size} x {candidate.gradient_accumulation_steps}",
        plan.dtype,
        "eager" if plan.compile == "off" else f"compile {plan.compile}",
        plan.attention,
        f"{plan.loss} loss" + (f" by {plan.loss_chunk_tokens}" if reads_chunks(plan) else ""),
    ]
    if plan.activation_checkpointing != "none":
        words.append(f"recompute {plan.activation_checkpointing}")
    if candidate.recipe.optimizer != "adamw":
        words.append(candidate.recipe.optimizer)
    for name, value in vars(plan).items():  # fields added later
        if name not in _IN_WORDS and value != getattr(_DEFAULT, name):
            words.append(value if name == "allocator" else f"{name} {value}")
    return ", ".join(words)


def describe_space(space: Space) -> str:
    """One line for each parameter, and the size of the space: what `--dry-run` prints."""
    width = max(map(len, space.choices))
    lines = [f"{name:<{width}}  {', '.join(map(str, choices))}" for name, choices in space.choices.items()]
    return "\n".join([*lines, f"{space.size:,} combinations"])
