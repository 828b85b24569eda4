"""nanoGPT's config files, read and written. Reading evaluates literals and arithmetic; no code is run."""

import reprlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autotune.config.assignments import LARGEST, Statement, UnreadableError, Value, read_assignments
from autotune.config.candidate import TRAINING_PARTS, Candidate, DType, Plan, Recipe, Shape, one_of
from autotune.config.tables import read_table
from autotune.errors import ConfigError, suggest
from autotune.files import read_text
from autotune.kernels import registry
from autotune.terminal import visible

# The defaults in nanoGPT's train.py, which also give each key its type. An empty dtype depends on the device.
DEFAULTS: dict[str, Value] = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
    "backend": "nccl", "device": "cuda", "dtype": "", "compile": True,
}  # fmt: skip


def _shared(cls: type) -> tuple[str, ...]:
    """Fields of a dataclass that are keys of train.py, with the same name and meaning."""
    return tuple(f.name for f in fields(cls) if f.name in DEFAULTS and f.name != "init_from")


_SHAPE, _RECIPE = _shared(Shape), _shared(Recipe)
_PARTS = {part: _shared(cls) for part, cls in TRAINING_PARTS.items()}
_MONITORING = tuple(key for keys in _PARTS.values() for key in keys)
_HARMLESS = (*_MONITORING, "out_dir", "dataset", "eval_only", "backend", "device")
"""Keys that cannot change a step: an unreadable value is skipped, with a note."""
# Keys of sample.py and bench.py, for example, which train.py does not know and a training does not need.
_FOREIGN = (
    "seed", "start", "num_samples", "max_new_tokens", "temperature", "top_k", "real_data", "profile", "init_seed",
)  # fmt: skip
_FOREIGN_PREFIXES = ("_", "wandb_", "tensorboard", "tb_", "mlflow_")
_VOCABULARY = "vocab_size"
"""Not a key of nanoGPT's train.py, which takes it from the data's meta.pkl, but of many scripts derived from it."""
_KEYS: dict[str, Value] = {**DEFAULTS, _VOCABULARY: Shape().vocab_size}

# The default of dtype in train.py, which copies of it contain.
_OWN_DTYPE = "'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'"

PRETRAINED = {
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
"""n_layer, n_head and n_embd of GPT-2's weights by their name in `init_from`; 1024 positions, 50257 words, biases."""
_PRETRAINED_POSITIONS, _PRETRAINED_WORDS = 1024, 50257

_MOST_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class NanoGPTFile:
    """The contents of a config file for nanoGPT's train.py."""

    candidate: Candidate
    vocab_size_given: bool
    """Whether the file gives the vocabulary size; otherwise the data's meta.pkl does, or it is nanoGPT's 50304."""
    dataset: str
    """Name of a folder in nanoGPT's `data/`; train.py's default if the file gives none."""
    out_dir: str
    notes: tuple[str, ...]
    """One line for each thing that was skipped because it cannot change a step."""


def read_nanogpt(path: Path, device: str, capability: tuple[int, ...] = ()) -> NanoGPTFile:
    """Read a nanoGPT config file as train.py would run it on `device` (`cpu`, `cuda:0`), without running it.
    Raises ConfigError that names every line with code, an unknown key or a value that is not allowed."""
    return parse_nanogpt(read_text(path, "give a nanoGPT config file"), str(path), device, capability)


def parse_nanogpt(text: str, where: str, device: str, capability: tuple[int, ...] = ()) -> NanoGPTFile:
    """`read_nanogpt` for a text that messages call `where`."""
    file = _File(text, where, device)
    values: dict[str, Any] = {**_KEYS, **file.values}
    dtype = _dtype(file, values["dtype"], device, capability)
    table = {
        **{key: values[key] for key in (*_RECIPE, *_MONITORING)},
        "shape": _shape(file, values),
        "global_batch_size": values["batch_size"] * values["gradient_accumulation_steps"],
        "schedule": "cosine" if values["decay_lr"] else "constant",
        "eval_batch_size": values["batch_size"],
        "checkpoint_interval": values["eval_interval"],
        "init_from": values["init_from"] if values["init_from"] in PRETRAINED else "",
    }
    if not values["decay_lr"]:  # without decay nanoGPT has no warm-up either
        table["warmup_iters"] = 0
    if table["global_batch_size"] > LARGEST:
        file.problem("batch_size", f"batch_size * gradient_accumulation_steps is beyond {LARGEST:.0e}; lower one")
    for cls in (Recipe, *TRAINING_PARTS.values()):
        file.check_alone(cls, _shared(cls))
    file.raise_problems()
    plan = Plan(
        micro_batch_size=values["batch_size"],
        compile="full" if values["compile"] else "off",
        dtype=dtype,
    )
    return NanoGPTFile(
        candidate=read_table(Candidate, {"recipe": table, "plan": vars(plan)}, where),
        vocab_size_given=_VOCABULARY in file.values or values["init_from"] in PRETRAINED,
        dataset=values["dataset"],
        out_dir=values["out_dir"],
        notes=file.notes(),
    )


class _File:
    """The keys that a file sets, and its problems by line."""

    def __init__(self, text: str, where: str, device: str) -> None:
        self.where = where
        self.values: dict[str, Value] = {}
        self.lines: dict[str, int] = {}
        self.refused: set[str] = set()
        self.problems: list[tuple[int, str]] = []
        self.skipped: list[tuple[int, str]] = []
        self.said: list[tuple[int, str]] = []
        statements, used = read_assignments(text, where, {**_KEYS, _OWN_DTYPE: ""})
        for one in statements:
            if one.name:
                self._assign(one, used)
            elif one.problem:
                self.problems.append((one.line, one.problem))
            else:
                self.skipped.append((one.line, f"`{one.code}`"))
        if self.values.get("eval_only"):
            self.said.append((self.lines["eval_only"], "eval_only = True is skipped: training is what is measured"))
        asked = self.values.get("device")
        if isinstance(asked, str) and registry.device_kind(asked) != registry.device_kind(device):
            self.said.append((self.lines["device"], f"device = {asked!r} is skipped: {device} is measured"))

    def _assign(self, one: Statement, used: set[str]) -> None:
        key = one.name
        if key not in _KEYS:
            if key in used:  # another value refers to it
                return
            if key in _FOREIGN or key.startswith(_FOREIGN_PREFIXES):
                self.skipped.append((one.line, key))
            else:
                near = suggest(key, _KEYS)
                advice = near if near.startswith("did") else "remove it, its effect on a step is not known"
                self.problems.append((one.line, f"{key} is not a key of nanoGPT's train.py; {advice}"))
        elif key == _VOCABULARY and one.value is None and not one.problem:
            self.values.pop(key, None)  # train.py leaves it to the data in this way
        else:
            self.lines[key] = one.line
            try:
                if one.problem:
                    raise UnreadableError(one.problem)
                self.values[key] = _checked(key, one.value)
            except UnreadableError as error:
                self._refuse(one.line, key, str(error))

    def _refuse(self, line: int, key: str, why: str) -> None:
        if key not in _HARMLESS:
            self.problems.append((line, why if why.startswith(key) else f"{key}: {why}"))
            self.refused.add(key)
            return
        self.values[key] = "" if key == "wandb_run_name" else DEFAULTS[key]
        stays = "wandb chooses the run's name" if key == "wandb_run_name" else f"{key} stays {DEFAULTS[key]!r}"
        self.said.append((line, f"{stays}, which changes no step: {why}"))

    def problem(self, key: str, what: str) -> None:
        """Record a value that is not allowed, at the line that sets it (0: none does)."""
        self.problems.append((self.lines.get(key, 0), what))

    def check_alone(self, cls: type, keys: tuple[str, ...]) -> None:
        """Check each value of the file separately by `cls`, so that every bad one is reported."""
        for key in keys:
            if key in self.values:
                try:
                    read_table(cls, {key: self.values[key]}, "")
                except ConfigError as error:
                    self.problem(key, _by_key(error))

    def raise_problems(self) -> None:
        problems = sorted(set(self.problems))
        texts = [f"line {line}: {what}" if line else what for line, what in problems[:_MOST_PROBLEMS]]
        if len(problems) == 1:
            raise ConfigError(f"{self.where}, {texts[0]}")
        if problems:
            rest = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
            raise ConfigError(f"{len(problems)} problems in {self.where}: {'; '.join([*texts, *rest])}")

    def notes(self) -> tuple[str, ...]:
        notes = [f"{self.where}, line {line}: {what}" for line, what in sorted(self.said)]
        if self.skipped:
            names = ", ".join(f"{what} (line {line})" for line, what in self.skipped)
            notes.append(f"{self.where}: skipped, as it cannot change a step: {names}")
        return tuple(notes)


def _shape(file: _File, values: dict[str, Any]) -> dict[str, Any]:
    """The model's values; those of GPT-2 if init_from names its weights."""
    shape = {key: values[key] for key in (*_SHAPE, _VOCABULARY)}
    start = values["init_from"]
    if start in PRETRAINED:
        layers, heads, width = PRETRAINED[start]
        if "block_size" in file.values and shape["block_size"] > _PRETRAINED_POSITIONS:
            file.problem("block_size", f"block_size = {shape['block_size']} is more than {start}'s 1024; lower it")
        said = f"{start}'s shape is measured, {layers}x{heads}x{width} with biases; to train, give its weights with"
        file.said.append((file.lines["init_from"], f"{said} --init-from DIR"))
        words = file.values.get(_VOCABULARY, _PRETRAINED_WORDS)
        return {**shape, "n_layer": layers, "n_head": heads, "n_embd": width, "bias": True, _VOCABULARY: words}
    if start != "scratch":
        allowed = ", ".join(PRETRAINED)
        shown = f"init_from = {reprlib.repr(start)}"
        file.problem("init_from", f"{shown} takes the shape from a checkpoint; set it to 'scratch', or to {allowed}")
    file.check_alone(Shape, ("dropout",))
    try:
        if not file.refused & {"n_head", "n_embd"}:
            Shape(n_head=shape["n_head"], n_embd=shape["n_embd"])
    except ConfigError as error:
        file.problem(max(("n_head", "n_embd"), key=lambda key: file.lines.get(key, 0)), _by_key(error))
    return shape


def _by_key(error: ConfigError) -> str:
    """The message with train.py's names, which have no tables."""
    return str(error).replace("model.", "").replace("training.", "")


def nanogpt_dtype(device: str, capability: tuple[int, ...]) -> DType:
    """The default in train.py: no autocast on the CPU, else bfloat16 if the card has it."""
    if device == "cpu":
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"


def _dtype(file: _File, written: str, device: str, capability: tuple[int, ...]) -> DType:
    if written:
        try:
            one_of("dtype", written, ("float32", "bfloat16", "float16"))
        except ConfigError as error:
            file.problem("dtype", str(error))
    if not written or device == "cpu":  # train.py uses dtype on CUDA only
        return nanogpt_dtype(device, capability)
    if capability >= (8, 0) and written == "float32":
        return "tfloat32"  # train.py enables it
    return written  # type: ignore[return-value]


def _checked(key: str, value: Value) -> Value:
    """The value in the type that train.py's command line requires; a whole float (1e3) may be an int."""
    kind, shown = type(_KEYS[key]), f"{key} = {reprlib.repr(value)}"
    if kind in (bool, str) and type(value) is kind:
        return value
    if kind in (bool, str) or isinstance(value, bool) or not isinstance(value, int | float):
        raise UnreadableError(f"{shown} must be of type {kind.__name__}")
    if not 0 <= value <= LARGEST:
        raise UnreadableError(f"{shown} is not allowed; write a number from 0 to {LARGEST:.0e}")
    if kind is float:
        return float(value)
    if value != int(value) or (value < 1 and key != "warmup_iters"):
        raise UnreadableError(f"{shown} must be a whole number above 0")
    return int(value)


def dataset_dir(dataset: str, config: Path) -> Path | None:
    """The folder of tokens that train.py would read for `dataset`: `data/<dataset>` in the working folder, beside the
    config file, or beside its folder (for a file in nanoGPT's `config/`). None: not found."""
    for root in (Path(), config.parent, config.resolve().parent.parent):
        folder = root / "data" / dataset
        if dataset and folder.is_dir() and any(folder.glob("*.bin")):
            return folder.resolve()
    return None


def format_nanogpt(candidate: Candidate, heading: str, device: str, *, dataset: str = "", out_dir: str = "") -> str:
    """A config file with which nanoGPT's train.py trains the same recipe on `device` (`cpu`, `cuda:0`). Comments name
    what train.py cannot do.

    dataset, out_dir: the user's values for these keys; empty: not known.
    """
    recipe, plan, initial = candidate.recipe, candidate.plan, candidate.checkpointing.init_from
    values, notes = nanogpt_values(candidate, device), [heading]
    if dataset:
        values["dataset"] = dataset
    if out_dir:
        values["out_dir"] = out_dir
    if (micro := values["batch_size"]) != plan.micro_batch_size:
        notes.append(
            f"The measured micro batch of {plan.micro_batch_size} does not divide the global batch of "
            f"{recipe.global_batch_size}; {micro} does, and nanoGPT pads nothing."
        )
    train_py_has = {
        "micro_batch_size": True,
        "processes": True,
        "compile": plan.compile != "block",
        "dtype": plan.dtype == "float32" if device == "cpu" else plan.dtype != "bfloat16_residual",
    }
    lost = [
        f"{name} = {value}"
        for name, value in vars(plan).items()
        if not train_py_has.get(name, value == getattr(Plan, name))
    ]
    if lost:
        notes.append(f"nanoGPT has no {', '.join(lost)}: expect it to be slower or to need more memory than measured.")
    if recipe.optimizer != "adamw":
        notes.append(f"nanoGPT has no {recipe.optimizer}: this trains with its AdamW.")
    if recipe.schedule == "wsd":
        notes.append("nanoGPT has no schedule wsd: this uses its cosine.")
    if recipe.train_seconds:
        notes.append(f"nanoGPT has no train_seconds: max_iters is what was planned for {recipe.train_seconds:g} s.")
    if (words := candidate.shape.vocab_size) != _KEYS[_VOCABULARY] and initial not in PRETRAINED:
        values[_VOCABULARY] = words
        if not (Path(recipe.data) / "meta.pkl").exists():
            notes.append(f"nanoGPT's own train.py takes its vocabulary, {words} here, from meta.pkl only.")
    if initial and initial not in PRETRAINED:
        notes.append(f"nanoGPT cannot start from the weights of {initial!r}: this starts from scratch.")
    if recipe.data and not (Path(recipe.data) / "train.bin").exists():
        wanted = "keep dataset only if it holds the same text" if dataset else "set dataset"
        notes.append(f"nanoGPT reads a train.bin and a val.bin, {recipe.data!r} holds shards: {wanted}.")
    # nanoGPT executes the file, so no name in a note may end its comment line
    comments = [f"# {visible(note)}" for note in notes]
    return "\n".join([*comments, *(f"{key} = {value!r}" for key, value in values.items()), ""])


def nanogpt_values(candidate: Candidate, device: str) -> dict[str, Value]:
    """The candidate in train.py's keys; the micro batch becomes the largest that divides the global batch."""
    recipe, shape, plan = candidate.recipe, candidate.shape, candidate.plan
    rows = recipe.global_batch_size
    # train.py divides gradient_accumulation_steps by the number of processes, and refuses a rest
    sizes = (size for size in range(1, plan.micro_batch_size + 1) if rows % (size * plan.processes) == 0)
    micro = max(sizes, default=1)
    values: dict[str, Value] = {
        "gradient_accumulation_steps": rows // micro,
        "batch_size": micro,
        **{key: getattr(shape, key) for key in _SHAPE},
        **{key: getattr(recipe, key) for key in _RECIPE},
        **{key: getattr(getattr(candidate, part), key) for part, keys in _PARTS.items() for key in keys},
        "decay_lr": recipe.schedule != "constant",
        "device": device,
        "dtype": plan.matrix_dtype,  # train.py enables tfloat32 itself
        "compile": plan.compile != "off",
    }
    if candidate.checkpointing.init_from in PRETRAINED:
        values["init_from"] = candidate.checkpointing.init_from
    if recipe.data and (Path(recipe.data) / "train.bin").exists():
        values["dataset"] = recipe.data  # train.py joins it to data/, and an absolute path replaces that
    return values
