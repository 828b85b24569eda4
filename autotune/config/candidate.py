"""A candidate: a recipe, which decides what is learned, and a plan, which changes speed and memory only.

How its training is evaluated, saved and tracked are settings apart: they change neither.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from autotune.errors import ConfigError, shown, suggest
from autotune.kernels import registry
from autotune.terminal import visible
from autotune.units import format_count

Compile = Literal["off", "full", "block"]
DType = Literal["float32", "tfloat32", "bfloat16", "bfloat16_residual", "float16"]
AUTOCAST = ("bfloat16", "float16")
"""dtypes whose matrix products have operands of two bytes, cast from float32."""
Allocator = Literal["default", "expandable_segments"]
Sharding = Literal["none", "optimizer", "full"]
Schedule = Literal["cosine", "wsd", "constant"]
Optimizer = Literal["adamw", "adamw_8bit", "muon"]

# Some hundred times the largest models: larger values are typing errors and would overflow later arithmetic.
_LARGEST_BATCH = 2**30
_LARGEST_COUNT = 10**15


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name} = {shown(value)} is not known; {suggest(str(value), allowed)}")


def plain_texts(table: str, values: Mapping[str, object]) -> None:
    """Raise ConfigError for a text with control characters, as names and values are shown on terminals and written to
    spreadsheets and to a config file that nanoGPT executes."""
    for name, value in values.items():
        inside = value if isinstance(value, tuple) else (value,)
        if isinstance(value, Mapping):
            plain_texts(f"{table}{name}.", value)
        for text in inside:
            if isinstance(text, str) and (escaped := visible(text)) != text:
                raise ConfigError(f'{table}{name} = "{escaped[:80]}" holds a control character; leave it out')


def at_least(name: str, value: float, smallest: float) -> None:
    """Raise ConfigError unless `value >= smallest`."""
    if not value >= smallest:
        raise ConfigError(f"{name} = {shown(value)} is not allowed; the smallest value is {smallest}")


def between(name: str, value: float, smallest: float, largest: float) -> None:
    """Raise ConfigError unless `smallest <= value <= largest`."""
    at_least(name, value, smallest)
    if value > largest:
        raise ConfigError(f"{name} = {shown(value)} is not allowed; the largest value is {largest:,}")


def number(default: float, at_least: float = 1, at_most: float = _LARGEST_COUNT) -> Any:
    """A dataclass field with bounds for `check`."""
    return field(default=default, metadata={"bounds": (at_least, at_most)})


@functools.cache
def _rules(cls: Any) -> list[tuple[str, tuple[str, ...], tuple[float, float] | None]]:
    """Name, choices and bounds of each field."""
    return [(f.name, get_args(f.type), f.metadata.get("bounds")) for f in fields(cls)]


def check(table: str, values: Any) -> None:
    """Raise ConfigError for a field of a dataclass that is out of its bounds or is none of its type's literals."""
    for name, choices, bounds in _rules(type(values)):  # type: ignore[arg-type]  # classes are hashable
        if choices:
            one_of(f"{table}.{name}", getattr(values, name), choices)
        if bounds:
            between(f"{table}.{name}", getattr(values, name), *bounds)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model."""

    arch: Literal["gpt2"] = "gpt2"
    """nanoGPT's model is the only one."""
    n_layer: int = number(12, at_most=10_000)
    n_head: int = number(12, at_most=10_000)
    n_embd: int = number(768, at_most=2**20)
    block_size: int = number(1024, at_most=2**27)
    """Tokens per sequence."""
    vocab_size: int = number(50304, at_most=2**27)
    """GPT-2's 50257 tokens, padded to a multiple of 64."""
    bias: bool = False
    """Whether linear layers and LayerNorms have biases."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check("model", self)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"model.n_embd = {self.n_embd} is not a multiple of model.n_head = {self.n_head}; change one of them"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout = {self.dropout} is not allowed; choose a number from 0 up to 1")

    @property
    def size(self) -> str:
        """Layers, heads and width as `parse_shape` reads them: `12x12x768`."""
        return f"{self.n_layer}x{self.n_head}x{self.n_embd}"

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def parameters(self) -> int:
        """Number of weights; the tied head is counted once."""
        width, biases = self.n_embd, int(self.bias)
        norm = width * (1 + biases)
        matrices = 12 * width * width + biases * (3 + 1 + 4 + 1) * width
        blocks = self.n_layer * (matrices + 2 * norm)
        return self.vocab_size * width + self.block_size * width + blocks + norm

    @property
    def parameters_non_embedding(self) -> int:
        """Number of weights without token and position embeddings: N in scaling laws."""
        return self.parameters - (self.vocab_size + self.block_size) * self.n_embd

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward by PaLM's convention (appendix B), without position embeddings."""
        without_positions = self.parameters - self.block_size * self.n_embd
        return 6.0 * without_positions + 12.0 * self.n_layer * self.n_embd * self.block_size


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is learned, and how. Plans are compared for the same recipe."""

    shape: Shape = Shape()
    global_batch_size: int = number(512, at_most=_LARGEST_BATCH)
    """Sequences per optimizer step."""
    max_iters: int = number(1000)
    """Optimizer steps of the training; those planned for it, if train_seconds is given."""
    train_seconds: float = number(0.0, 0)
    """Wall clock of the training from the start of its process, over all resumptions. Its schedule is stretched or
    compressed to end then. 0: it ends at max_iters."""
    optimizer: Optimizer = "adamw"
    """`adamw` is torch's fused AdamW; `adamw_8bit` keeps moments in 8 bits (package bitsandbytes); `muon` updates the
    blocks' matrices, and AdamW everything else."""
    learning_rate: float = 6e-4
    min_lr: float = number(6e-5, 0, math.inf)
    schedule: Schedule = "cosine"
    """After the warm-up: `cosine` to min_lr, `wsd` (level, then linearly to min_lr) or `constant`."""
    warmup_iters: int = number(100, 0)
    lr_decay_iters: int = number(1000)
    """The step at which min_lr is reached."""
    decay_share: float = 0.2
    """Fraction of lr_decay_iters in which the rate of `wsd` falls."""
    weight_decay: float = number(0.1, 0, math.inf)
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = number(1.0, 0, math.inf)
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = number(1337, 0, 2**63 - 1)
    data: str = ""
    """Directory of shards; empty: synthetic tokens, for measurements only."""

    def __post_init__(self) -> None:
        plain_texts("training.", vars(self))
        check("training", self)
        if self.learning_rate <= 0:
            raise ConfigError(f"training.learning_rate = {self.learning_rate} must be above 0")
        if not 0.0 < self.decay_share <= 1.0:
            raise ConfigError(f"training.decay_share = {self.decay_share} must lie in (0, 1]")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"training.{name} = {getattr(self, name)} must lie in [0, 1)")

    def __str__(self) -> str:
        """What is learned, and how, on one line; the schedule aside."""
        shape, batch = self.shape, format_count(self.tokens_per_step)
        words = f"{shape.size}, block {shape.block_size}, {self.optimizer}, rate {self.learning_rate:g}"
        return f"{words}, {batch} tokens a step"

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.shape.block_size

    @property
    def max_tokens(self) -> int:
        return self.max_iters * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a training measures its validation loss."""

    eval_interval: int = number(250)
    """Optimizer steps between evaluations."""
    eval_iters: int = number(20)
    """Validation batches per evaluation."""
    eval_batch_size: int = number(0, 0, _LARGEST_BATCH)
    """Sequences per validation batch; 0: the plan's micro batch."""

    def __post_init__(self) -> None:
        check("training", self)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Which weights a training starts from, and when it saves its own."""

    checkpoint_interval: int = number(250)
    """Optimizer steps between checkpoints."""
    always_save_checkpoint: bool = True
    """False: save only when the validation loss has improved, and at the end."""
    init_from: str = ""
    """Initial weights: nanoGPT's ckpt.pt, a GPT-2 directory of Hugging Face, or a checkpoint; empty: random."""

    def __post_init__(self) -> None:
        plain_texts("training.", vars(self))
        check("training", self)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """When a training logs, and where besides its own log."""

    log_interval: int = number(10)
    """Optimizer steps between two rows of the log."""
    tensorboard: bool = False
    """Write TensorBoard files."""
    wandb_log: bool = False
    """Send the rows to Weights & Biases, which reads its own environment variables (WANDB_MODE)."""
    wandb_project: str = "autotune"
    wandb_run_name: str = ""

    def __post_init__(self) -> None:
        plain_texts("training.", vars(self))
        check("training", self)


TRAINING_PARTS = {"evaluation": Evaluation, "checkpointing": Checkpointing, "tracking": Tracking}
"""Settings that share the table [training] with the recipe."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a step is executed. Changes speed and memory, never what is learned. A new field is written to files, columns
    and reports without further code."""

    micro_batch_size: int = number(8, at_most=_LARGEST_BATCH)
    """Sequences per forward and backward."""
    attention: str = "sdpa"
    """A row of `autotune kernels`."""
    loss: str = "full"
    """A row of `autotune kernels`."""
    loss_chunk_tokens: int = number(1024)
    """Tokens whose logits exist at one time, in chunked losses."""
    activation_checkpointing: str = "none"
    """What the backward recomputes: nothing, each `block`, every second block (`every_2`), all but matrix products and
    attention (`selective`), or enough for compiled graphs to keep half of their activations (`budget_0.5`)."""
    compile: Compile = "full"
    dtype: DType = "bfloat16"
    """dtype of matrix products, through autocast; weights and optimizer state stay float32. `tfloat32` is float32 with
    factors rounded to 10 bits of mantissa. `bfloat16_residual` keeps the residual stream in bfloat16 too, as llm.c and
    nanochat do."""
    allocator: Allocator = "default"
    processes: int = number(1, at_most=10_000)
    """Processes under torchrun that train one model, with a card each and parts of every batch."""
    sharding: Sharding = "none"
    """What they divide: nothing, each a replica; the `optimizer`'s state (ZeRO stage 1); or weights, gradients and
    optimizer state (`full`, torch's FSDP2)."""

    def __post_init__(self) -> None:
        check("plan", self)
        one_of("plan.attention", self.attention, registry.names("attention"))
        one_of("plan.loss", self.loss, registry.names("loss"))
        # a regular expression that allows one spelling of each value
        known = r"none|block|selective|every_([2-9]|[1-9][0-9]{1,5})|budget_(0|1|0\.[0-9]{0,8}[1-9])"
        if re.fullmatch(known, self.activation_checkpointing) is None:
            raise ConfigError(
                f"plan.activation_checkpointing = {shown(self.activation_checkpointing)} is not known; choose from "
                "none, block, selective, every_2 (or any larger number), budget_0.5 (any number from 0 to 1, without "
                "zeros at its end)"
            )

    @property
    def matrix_dtype(self) -> str:
        """torch's name for the dtype in which operands of matrix products are stored."""
        return {"tfloat32": "float32", "bfloat16_residual": "bfloat16"}.get(self.dtype, self.dtype)

    @property
    def recomputed_every(self) -> int | None:
        """Recompute one block out of this many; None: no block."""
        kind, _, number = self.activation_checkpointing.partition("_")
        return int(number) if kind == "every" else 1 if kind == "block" else None

    @property
    def memory_budget(self) -> float | None:
        """Fraction of a compiled graph's activations to keep, in [0, 1]; None: no budget."""
        kind, _, number = self.activation_checkpointing.partition("_")
        return float(number) if kind == "budget" else None


def split_training(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """A table in today's form. Older versions kept all keys of a training in `recipe`, and had the unfused AdamW, which
    learns the same, as an optimizer of its own."""
    recipe = table.get("recipe")
    if not isinstance(recipe, Mapping):
        return table
    parts = {
        part: {f.name: recipe[f.name] for f in fields(cls) if f.name in recipe} for part, cls in TRAINING_PARTS.items()
    }
    moved = {key for part in parts.values() for key in part}
    rest = {key: value for key, value in recipe.items() if key not in moved}
    if rest.get("optimizer") == "adamw_unfused":
        rest["optimizer"] = "adamw"
    return {**{part: values for part, values in parts.items() if values}, **table, "recipe": rest}


_FIRST_PLAN_FIELDS = (
    "micro_batch_size", "attention", "loss", "loss_chunk_tokens", "activation_checkpointing", "compile", "dtype",
    "allocator",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe and a plan for it, and how its training is evaluated, saved and tracked."""

    recipe: Recipe = Recipe()
    plan: Plan = Plan()
    evaluation: Evaluation = Evaluation()
    checkpointing: Checkpointing = Checkpointing()
    tracking: Tracking = Tracking()

    def __post_init__(self) -> None:
        if self.plan.micro_batch_size > self.recipe.global_batch_size:
            raise ConfigError(
                f"plan.micro_batch_size = {self.plan.micro_batch_size} is larger than "
                f"training.global_batch_size = {self.recipe.global_batch_size}; lower it"
            )
        if self.plan.processes > self.recipe.global_batch_size:
            raise ConfigError(
                f"training.global_batch_size = {self.recipe.global_batch_size} is less than one sequence for each of "
                f"{self.plan.processes} processes; start fewer"
            )

    @property
    def shape(self) -> Shape:
        return self.recipe.shape

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step and process, in the one that has most."""
        return -(-self.recipe.global_batch_size // self.plan.processes)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro steps per optimizer step and process; the last one is padded if the division leaves a remainder."""
        return -(-self.sequences // self.plan.micro_batch_size)

    @functools.cached_property
    def id(self) -> str:
        """10 hexadecimal digits, equal for candidates that execute the same step. Fields of the plan that are newer
        than the first records count only where they differ from their default, so that recorded ids stay."""
        default = vars(type(self.plan)())
        plan = {n: v for n, v in vars(self.plan).items() if n in _FIRST_PLAN_FIELDS or v != default[n]}
        executed = {
            "shape": vars(self.shape),
            "plan": plan,
            "global_batch_size": self.recipe.global_batch_size,
            "optimizer": self.recipe.optimizer,
        }
        return hashlib.sha256(json.dumps(executed, sort_keys=True).encode()).hexdigest()[:10]

    upgrade = staticmethod(split_training)


def parse_shape(text: str, default: Shape) -> Shape:
    """`12x12x768` (layers x heads x width), or `12x12x768x1024` with the block size. Raises ConfigError."""
    words = text.lower().split("x")
    if len(words) not in (3, 4) or not all(re.fullmatch(r"[0-9]{1,12}", word) for word in words):
        raise ConfigError(f"--model {shown(text)} is not understood; write layers x heads x width, say 12x12x768")
    n_layer, n_head, n_embd, *block = map(int, words)
    return replace(default, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=(*block, default.block_size)[0])
