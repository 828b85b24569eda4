"""nanoGPT's config files, in and out. Reading parses literals and arithmetic; nothing is executed."""

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.config.candidate import Candidate, DType, Plan, Recipe, one_of
from autotune.config.tables import read_table
from autotune.config.toml import read_text
from autotune.errors import ConfigError, suggest
from autotune.terminal import visible

Value = str | int | float | bool | None

# The defaults of nanoGPT's train.py, and by them each key's type. An empty dtype depends on the device.
DEFAULTS: dict[str, Value] = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
    "backend": "nccl", "device": "cuda", "dtype": "", "compile": True,
}  # fmt: skip

# What a shape, and what a recipe, and train.py call by the same name.
_SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
_SHARED = (
    "learning_rate", "max_iters", "weight_decay", "beta1", "beta2", "grad_clip", "warmup_iters", "lr_decay_iters",
    "min_lr", "eval_interval", "eval_iters", "log_interval", "always_save_checkpoint", "wandb_log", "wandb_project",
    "wandb_run_name",
)  # fmt: skip

_ARITHMETIC: dict[type[ast.operator | ast.unaryop], Callable[..., int | float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_LARGEST = 1e18
"""Of a number in a file; keeps `9**9**9` from being computed."""


def read_nanogpt(path: Path, device: str, capability: tuple[int, ...] = ()) -> Candidate:
    """A nanoGPT config file as train.py would run it on `device` (`cpu`, `cuda:0`); nothing is executed.
    Raises ConfigError with the line for code, an unknown key, or a value of another type."""
    return parse_nanogpt(read_text(path, "give a nanoGPT config file"), str(path), device, capability)


def parse_nanogpt(text: str, where: str, device: str, capability: tuple[int, ...] = ()) -> Candidate:
    """`read_nanogpt` of a text; `where` names it in messages."""
    values: dict[str, Any] = {**DEFAULTS, **_assignments(text, where)}
    for key, only in (("init_from", "scratch"), ("eval_only", False)):
        if values[key] != only:
            raise ConfigError(f"{where}: {key} = {values[key]!r} trains nothing from scratch; set it to {only!r}")
    table = {
        **{key: values[key] for key in _SHARED},
        "shape": {key: values[key] for key in _SHAPE},
        "global_batch_size": values["batch_size"] * values["gradient_accumulation_steps"],
        "schedule": "cosine" if values["decay_lr"] else "constant",
        "eval_batch_size": values["batch_size"],
        "checkpoint_interval": values["eval_interval"],
    }
    if not values["decay_lr"]:  # where its rate does not decay, nanoGPT does not warm up either
        table["warmup_iters"] = 0
    plan = Plan(
        micro_batch_size=values["batch_size"],
        compile="full" if values["compile"] else "off",
        dtype=_dtype(values["dtype"], device, capability),
    )
    return Candidate(recipe=read_table(Recipe, table, where), plan=plan)


def nanogpt_dtype(device: str, capability: tuple[int, ...]) -> DType:
    """train.py's default: no autocast on the CPU, else bfloat16 where the card has it."""
    if device == "cpu":
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"


def _dtype(written: str, device: str, capability: tuple[int, ...]) -> DType:
    if written:
        one_of("dtype", written, ("float32", "bfloat16", "float16"))
    if not written or device == "cpu":  # train.py heeds its dtype on CUDA only
        return nanogpt_dtype(device, capability)
    if capability >= (8, 0) and written == "float32":
        return "tfloat32"  # train.py allows it
    return written  # type: ignore[return-value]


def _assignments(text: str, where: str) -> dict[str, Value]:
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: {error.msg}; write key = value lines") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where} is not a nanoGPT config file: {error}; write key = value lines") from None
    values: dict[str, Value] = {}
    for statement in statements:
        place = f"{where}, line {statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ConfigError(f"{place}: only `key = value` is read, code is not run; write the value as a literal")
        key = statement.targets[0].id
        if len(statement.targets) > 1 or key not in DEFAULTS:
            raise ConfigError(f"{place}: {key} is not a key of nanoGPT's train.py; {suggest(key, DEFAULTS)}")
        try:
            values[key] = _checked(key, _evaluate(statement.value, values, place), place)
        except RecursionError:
            raise ConfigError(f"{place}: {key} is nested too deeply; write its value as a literal") from None
    return values


def _evaluate(node: ast.expr, known: dict[str, Value], place: str) -> Value:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in {**DEFAULTS, **known}:
        return known.get(node.id, DEFAULTS.get(node.id))
    if not isinstance(node, ast.BinOp | ast.UnaryOp) or type(node.op) not in _ARITHMETIC:
        raise ConfigError(f"{place}: only literals and arithmetic are read, code is not run; write the value itself")
    compute = _ARITHMETIC[type(node.op)]
    operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
    numbers = [_evaluate(operand, known, place) for operand in operands]
    if not all(isinstance(number, int | float) and abs(number) <= _LARGEST for number in numbers):
        raise ConfigError(f"{place}: arithmetic is for numbers up to {_LARGEST:.0e}; write the value itself")
    if compute is operator.pow and abs(numbers[1]) > 64:  # type: ignore[arg-type]
        raise ConfigError(f"{place}: an exponent above 64 is not read; write the value itself")
    try:
        result = compute(*numbers)
    except ArithmeticError as error:
        raise ConfigError(f"{place}: {error}; write the value itself") from None
    if not isinstance(result, int | float) or not abs(result) <= _LARGEST:
        raise ConfigError(f"{place}: the value is beyond {_LARGEST:.0e}; write a smaller one")
    return result


def _checked(key: str, value: Value, place: str) -> Value:
    """The same types that train.py's command line insists on, whole floats (1e3) as whole numbers aside."""
    kind = type(DEFAULTS[key])
    if kind in (bool, str) and type(value) is kind:
        return value
    if kind in (bool, str) or isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{place}: {key} = {value!r} must be of type {kind.__name__}")
    if not 0 <= value <= _LARGEST:
        raise ConfigError(f"{place}: {key} = {value!r} is not allowed; write a number from 0 to {_LARGEST:.0e}")
    if kind is float:
        return float(value)
    if value != int(value) or (value < 1 and key != "warmup_iters"):
        raise ConfigError(f"{place}: {key} = {value!r} must be a whole number above 0")
    return int(value)


def format_nanogpt(candidate: Candidate, heading: str, device: str) -> str:
    """A config file for nanoGPT's train.py that trains the same recipe on `device` (`cpu`, `cuda:0`); comments say
    what it cannot express."""
    recipe, shape, plan = candidate.recipe, candidate.shape, candidate.plan
    values, notes = nanogpt_values(candidate, device), [heading]
    if (micro := values["batch_size"]) != plan.micro_batch_size:
        notes.append(
            f"The measured micro batch of {plan.micro_batch_size} does not divide the global batch of "
            f"{recipe.global_batch_size}; {micro} does, and nanoGPT pads nothing."
        )
    plain, knobs = vars(Plan()), ("attention", "loss", "activation_checkpointing", "allocator")
    lost = [f"{name} = {value}" for name, value in vars(plan).items() if name in knobs and value != plain[name]]
    if plan.compile == "block":
        lost.append("compile = block")
    if shape.vocab_size != 50304:
        lost.append(f"vocab_size = {shape.vocab_size}")
    if device == "cpu" and plan.dtype != "float32":
        lost.append(f"dtype = {plan.dtype} on the CPU")
    elif plan.dtype == "bfloat16_residual":
        lost.append("dtype = bfloat16_residual")
    if lost:
        notes.append(f"nanoGPT has no {', '.join(lost)}: expect it to be slower or to need more memory than measured.")
    if recipe.optimizer in ("muon", "adamw_8bit"):
        notes.append(f"nanoGPT has no {recipe.optimizer}: this trains with its AdamW.")
    if recipe.schedule == "wsd":
        notes.append("nanoGPT has no schedule wsd: this is its cosine.")
    if recipe.data and "dataset" not in values:
        notes.append(f"Set dataset: nanoGPT reads a train.bin and a val.bin, {recipe.data} holds shards.")
    # nanoGPT executes the file: a note must not reach beyond its line, whoever chose the names in it
    lines = [*(f"# {visible(note)}" for note in notes), *(f"{key} = {value!r}" for key, value in values.items())]
    return "\n".join([*lines, ""])


def nanogpt_values(candidate: Candidate, device: str) -> dict[str, Value]:
    """The candidate by the keys of train.py; its micro batch is the largest that divides the global batch."""
    recipe, shape, plan = candidate.recipe, candidate.shape, candidate.plan
    rows = recipe.global_batch_size
    micro = max(size for size in range(1, plan.micro_batch_size + 1) if rows % size == 0)
    values: dict[str, Value] = {
        "gradient_accumulation_steps": rows // micro,
        "batch_size": micro,
        **{key: getattr(shape, key) for key in _SHAPE},
        **{key: getattr(recipe, key) for key in _SHARED},
        "decay_lr": recipe.schedule != "constant",
        "device": device,
        "dtype": plan.matrix_dtype,  # train.py allows tfloat32 by itself
        "compile": plan.compile != "off",
    }
    if recipe.data and (Path(recipe.data) / "train.bin").exists():
        values["dataset"] = recipe.data  # train.py joins it to data/, which an absolute path replaces
    return values
