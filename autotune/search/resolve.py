"""From the words on the command line to settings in which nothing is left open."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from autotune.config.candidate import TRAINING_PARTS, Plan, Recipe, Shape, at_least, one_of, parse_shape
from autotune.config.nanogpt import NanoGPTFile, dataset_dir, nanogpt_dtype, parse_nanogpt, read_nanogpt
from autotune.config.presets import GuideRow
from autotune.config.search_settings import Objective, Race, SearchSettings, Target
from autotune.config.toml import read_candidate
from autotune.data.batches import open_batches
from autotune.data.sources import how_to_prepare
from autotune.data.vocabulary import check_ids, data_vocabulary
from autotune.environment import Environment, Slot
from autotune.errors import ConfigError, shown
from autotune.kernels.registry import device_kind
from autotune.runs.law import find_law
from autotune.search.space import build_space, describe_space
from autotune.units import MIB, format_bytes, format_count, format_duration, parse_bytes, parse_count, parse_duration

# nanoGPT's batch for one card, and the batch and model of its README for laptops without one.
_CUDA = Recipe(shape=Shape(), global_batch_size=512)
_CPU = Recipe(shape=Shape(n_layer=4, n_head=4, n_embd=128, block_size=64), global_batch_size=64)
_MICRO_BATCH_SIZE = 12
_TRAIN_SECONDS = {"cuda": 24 * 3600.0, "cpu": 120.0}


def resolve(
    environment: Environment,
    *,
    budget: str = "1h",
    objective: str = "",
    memory_limit: str = "",
    train_time: str = "",
    train_tokens: str = "",
    model: str = "",
    from_file: Path | None = None,
    guide: GuideRow | None = None,
    data: Path | None = None,
    slots: Sequence[Slot] = (),
    storage: str = "",
    seed: int = 0,
    sampler: str = "additive",
    name: str = "",
    law: str = "lingle",
    vocab_size: int | None = None,
    choices: Sequence[str] = (),
    race: str = "",
    keep: str = "",
    target: str = "autotune",
) -> SearchSettings:
    """The command line's words (empty: not given) as settings for the machine of `environment`.
    Raises ConfigError for a word that is not understood and for flags that contradict each other, DataError for
    a data directory that cannot be trained on."""
    if keep:
        one_of("--keep", keep, ("learning",))
        if objective == "loss":
            raise ConfigError("--objective loss changes what is learned, --keep learning does not; leave one out")
        objective = "throughput"
    fixed = _fixed_by(model, from_file, guide)
    if objective == "throughput" and not fixed:
        raise ConfigError(
            "--objective throughput needs a shape, or the smallest model would always win; "
            "add for example --model 12x12x768, or use --objective loss"
        )
    chosen = objective or ("throughput" if fixed else "loss")
    processes = environment.processes
    recipe, baseline, source, read = _start(environment, model, from_file, guide)
    baseline = replace(baseline, processes=processes)
    if processes == 1 and baseline.sharding != "none":
        raise ConfigError(f"plan.sharding = {baseline.sharding!r} divides among processes; add for example --nproc 2")
    data, dataset, notes = _dataset(data, from_file, read)
    race = _race(race, chosen, fixed, data, processes)
    words = _vocabulary(vocab_size, recipe.shape, read is not None and read.vocab_size_given, data)
    recipe = replace(recipe, shape=replace(recipe.shape, vocab_size=words))
    seconds = parse_duration(train_time) if train_time else None
    tokens = parse_count(train_tokens) if train_tokens else None
    for flag, word, value in (("--train-time", train_time, seconds), ("--train-tokens", train_tokens, tokens)):
        if value == 0:
            raise ConfigError(f"{flag} {word} leaves nothing to train; give for example 24h or 10B")
    if tokens is not None and tokens < recipe.tokens_per_step:
        meant = re.sub(r"[^0-9.]", "", train_tokens)
        raise ConfigError(
            f"--train-tokens {train_tokens} is less than one optimizer step "
            f"({recipe.tokens_per_step:,} tokens); did you mean {meant}B?"
        )
    given = seconds is not None or tokens is not None
    if not given and read is None:
        seconds = _TRAIN_SECONDS[device_kind(environment.device)]
    elif not given and chosen == "loss":  # as long as the file's own training
        seconds = recipe.train_seconds or None
        tokens = None if seconds else recipe.max_tokens
    settings = SearchSettings(
        name=name or time.strftime("%Y%m%d-%H%M%S-") + chosen,
        device=environment.device,
        budget_seconds=parse_duration(budget),
        objective=cast("Objective", chosen),
        memory_limit_bytes=memory_limit_of(environment, memory_limit, guide),
        train_seconds=seconds,
        train_tokens=tokens,
        recipe=replace(recipe, data=_data_dir(data, recipe)),
        **({part: getattr(read.candidate, part) for part in TRAINING_PARTS} if read else {}),
        search_shape=not fixed,
        choices=dict(_choices(words) for words in choices),
        baseline=baseline,
        baseline_source=source,
        dataset=dataset,
        out_dir=read.out_dir if read else "",
        notes=notes,
        # A length given on the command line replaces the file's, and the schedule must follow it.
        keep_schedule=read is not None and not given and chosen == "throughput",
        own_rate=read is not None,
        law=find_law(law).name,
        race=cast("Race", race),
        target=cast("Target", target),
        workers=max(1, len(slots)),
        devices=tuple(slot.device for slot in slots) if environment.device != "cpu" and len(slots) > 1 else (),
        storage=storage,
        seed=seed,
        sampler=sampler,
    )
    build_space(settings, environment)  # raises for choices that it does not have
    return settings


ONE_PROCESS = "a race trains in one process, so with --nproc there is none: the winner is by the law, not raced"
"""Remark on a search for the lowest loss with several processes."""
NO_TEXT = "there is no race without text: the winner is by the law, not raced; give --data DIR"
"""Remark on a search for the lowest loss without data."""


def _race(word: str, objective: str, fixed: str, data: Path | None, processes: int) -> str:
    """Whether candidates are raced: as given, else wherever the loss is sought and there is text. `fixed`: the flag
    that fixes the shape, for which only a race compares losses."""
    if word == "on" and processes > 1:
        raise ConfigError(f"--race on trains in one process, --nproc {processes} is several; leave one of the two out")
    if word:
        one_of("--race", word, ("off", "on"))
    if word == "on" and objective != "loss":
        raise ConfigError("--race on seeks the lowest loss, which changes what is learned; add --objective loss")
    if word == "on" and data is None:
        raise ConfigError("--race on trains on your text; add --data DIR, or use --race off")
    race = word or ("on" if objective == "loss" and data is not None and processes == 1 else "off")
    if race == "off" and objective == "loss" and fixed:
        raise ConfigError(
            f"--objective loss compares shapes, but {fixed} fixes the shape; add --data DIR for a race of recipes, "
            "or leave one of the two out"
        )
    return race


def _choices(words: str) -> tuple[str, tuple[str, ...]]:
    """`compile=off,block` as a name and its values."""
    name, equals, values = words.partition("=")
    if not equals or not all(values.split(",")):
        raise ConfigError(f"--choices {shown(words)} is not understood; write for example compile=off,block")
    return name.strip(), tuple(value.strip() for value in values.split(","))


def _fixed_by(model: str, from_file: Path | None, row: GuideRow | None) -> str:
    """The flag that fixes the shape, empty if there is none."""
    words = {"--model": model, "--from": from_file, "--guide": row and row.name}
    given = {flag: word for flag, word in words.items() if word}
    if len(given) > 1:
        both = " and ".join(f"{flag} {word}" for flag, word in given.items())
        raise ConfigError(f"{both} both fix the shape; give one")
    return next(iter(given), "")


def _start(
    environment: Environment, model: str, from_file: Path | None, row: GuideRow | None
) -> tuple[Recipe, Plan, str, NanoGPTFile | None]:
    """The recipe, trial 0's plan, what that is called, and the file that both come from."""
    if from_file is not None:
        read = _read(from_file, environment)
        return read.candidate.recipe, read.candidate.plan, str(from_file), read
    if row is not None:
        source = f"the guide's row {row.name}"
        read = parse_nanogpt(row.config, source, environment.device, environment.capability)
        return read.candidate.recipe, read.candidate.plan, source, read
    recipe = _CPU if environment.device == "cpu" else _CUDA
    if model:
        shape = parse_shape(model, recipe.shape)
        sequences = max(1, recipe.tokens_per_step // shape.block_size)
        recipe = replace(recipe, shape=shape, global_batch_size=sequences)
    plan = Plan(
        micro_batch_size=min(_MICRO_BATCH_SIZE, recipe.global_batch_size),
        compile="full",
        dtype=nanogpt_dtype(environment.device, environment.capability),
    )
    return recipe, plan, "plain nanoGPT", None


def _read(path: Path, environment: Environment) -> NanoGPTFile:
    """A nanoGPT config file, or a candidate file (.toml)."""
    if path.suffix != ".toml":
        return read_nanogpt(path, environment.device, environment.capability)
    candidate = read_candidate(path).candidate
    return NanoGPTFile(candidate=candidate, vocab_size_given=True, dataset="", out_dir="", notes=())


def _dataset(
    data: Path | None, from_file: Path | None, read: NanoGPTFile | None
) -> tuple[Path | None, str, tuple[str, ...]]:
    """The data directory (--data, else the folder of the file's dataset where it is here), nanoGPT's name of it (empty
    where it has none), and the notes on the file."""
    if read is None or from_file is None:
        return data, "", ()
    if not read.dataset:  # a candidate file names a directory
        return data or (Path(own) if (own := read.candidate.recipe.data) else None), "", read.notes
    folder = dataset_dir(read.dataset, from_file)
    if data is not None:
        # nanoGPT can read the directory given, by its path: the file's dataset is another one
        replaced = (data / "train.bin").exists() and data.resolve() != folder
        return data, "" if replaced else read.dataset, read.notes
    if folder is None:
        found = f"has no folder of tokens here (data/{read.dataset}); synthetic tokens are measured, or give --data DIR"
    else:
        found = f"is {folder}, which is measured"
    return folder, read.dataset, (*read.notes, f"{from_file}: dataset {read.dataset!r} {found}")


def memory_limit_of(environment: Environment, word: str = "", row: GuideRow | None = None) -> int:
    """As given; else all of a card but what its driver and desktop need, 80 % of main memory. `row`: no more than
    there would be of the guide's card."""
    whole = environment.device_memory_bytes
    if not word:
        own = int(0.8 * whole) if environment.device == "cpu" else _usable(whole)
        return min(own, _usable(row.memory_bytes)) if row else own
    limit = parse_bytes(word)
    if limit > whole:
        raise ConfigError(
            f"--memory-limit {word} is more than {environment.device_name or environment.device} has "
            f"({format_bytes(whole)}); give less, or leave it out"
        )
    return limit


def _usable(memory_bytes: int) -> int:
    return memory_bytes - max(512 * MIB, memory_bytes // 50)


def _vocabulary(asked: int | None, shape: Shape, given: bool, data: Path | None) -> int:
    """As --vocab-size says, else the config file (where it is `given`), else the data; GPT-2's where none of them says
    anything."""
    if asked is not None:
        at_least("--vocab-size", asked, 1)
        return asked
    if given or data is None or not data.is_dir():
        return shape.vocab_size
    found = data_vocabulary(data)
    return found[0] if found else shape.vocab_size


def _data_dir(data: Path | None, recipe: Recipe) -> str:
    """The directory, looked into now: what it lacks must not cost a trial."""
    if data is None:
        return ""
    if not data.is_dir():
        raise ConfigError(f"--data {data} is not a directory of tokens; {how_to_prepare(data)}")
    open_batches(
        data,
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        block_size=recipe.shape.block_size,
        vocab_size=recipe.shape.vocab_size,
    )
    check_ids(data, recipe.shape.vocab_size)
    return str(data.resolve())


def _how(settings: SearchSettings) -> str:
    if settings.objective == "throughput":
        return ""
    if settings.race == "off":
        return f" by the law {settings.law!r}, not raced"
    rivals = f"the best by the law {settings.law!r}" if settings.search_shape else "recipes for one shape"
    return f" by a race in {settings.race_share:.0%} of the budget, of {rivals}"


def _devices(settings: SearchSettings, environment: Environment) -> str:
    if environment.processes > 1:
        parts = f"{environment.threads} cores each" if environment.device == "cpu" else "a card each"
        return f"{environment.processes} processes, {parts}"
    if environment.workers > 1:
        return f"{environment.workers} workers of {environment.cpu_count} cores"
    return ", ".join(settings.devices) or environment.device


def describe_settings(settings: SearchSettings, environment: Environment) -> str:
    """Settings and space in plain lines: what `--dry-run` prints."""
    recipe, shape, baseline = settings.recipe, settings.recipe.shape, settings.baseline
    length = f"{format_count(settings.train_tokens or recipe.max_tokens)} tokens"
    if settings.train_seconds is not None:
        length = format_duration(settings.train_seconds)
    facts = {
        "name": settings.name,
        "device": f"{_devices(settings, environment)} ({environment.device_name})",
        "budget": format_duration(settings.budget_seconds),
        "objective": settings.objective + _how(settings),
        "memory limit": format_bytes(settings.memory_limit_bytes),
        "training": f"{length}, {recipe.tokens_per_step:,} tokens a step",
        "data": recipe.data or "synthetic tokens",
        "vocabulary": f"{shape.vocab_size:,} words",
        "baseline": f"{settings.baseline_source}: {shape.size}, "
        f"{shape.parameters:,} parameters, micro batch {baseline.micro_batch_size}",
    }
    lines = [f"{key:<12}  {value}" for key, value in facts.items()]
    return "\n".join([*lines, "", describe_space(build_space(settings, environment))])
