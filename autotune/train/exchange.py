"""Export and import of weights: nanoGPT's ckpt.pt, and GPT-2 directories of Hugging Face transformers."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autotune.config.candidate import Candidate, one_of
from autotune.config.nanogpt import DEFAULTS, nanogpt_values
from autotune.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, rank_files
from autotune.errors import CheckpointError, ConfigError, one_line
from autotune.model.checkpoint import Checkpoint, check_finite, save_tensors
from autotune.model.gpt import GPT
from autotune.model.step import build
from autotune.train.sample import INFERENCE, find_checkpoint, load_model

_CPU = torch.device("cpu")
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Weights that transformers stores as (in, out), transposed."""

_WRAPPERS = {
    "transformer", "module", "model", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # fmt: skip
"""Name components that DistributedDataParallel, torch.compile and others insert, at any depth."""
_GPT2 = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
"""Keys of config.json, with the only values for which the weights give the same model here."""


def export(path: Path, to: str, out: Path, *, cut_vocab: bool = False) -> str:
    """Write the checkpoint at `path` (or the newest of a training or run) into a new directory. Returns a note or "".

    hf: config.json, model.safetensors and GPT-2's tokenizer, for `GPT2LMHeadModel.from_pretrained(out)`.
    nanogpt: ckpt.pt, for nanoGPT's sample.py and train.py --init_from=resume.
    cut_vocab: hf without the padding of the vocabulary, so that its size is the tokenizer's.
    Raises ConfigError or CheckpointError, with nothing left behind.
    """
    one_of("--to", to, ("hf", "nanogpt"))
    checkpoint = find_checkpoint(path)
    if cut_vocab and to != "hf":
        raise ConfigError(f"--cut-vocab needs --to hf; for {to} the padding is kept, as nanoGPT needs it to resume")
    words = checkpoint.state.candidate.shape.vocab_size
    if cut_vocab and words < VOCAB_SIZE:
        raise ConfigError(f"--cut-vocab: a vocabulary of {words} is not GPT-2's {VOCAB_SIZE} padded; leave it out")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; give a new directory")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        rows = VOCAB_SIZE if cut_vocab else words
        note = _write_hf(checkpoint, temporary, rows) if to == "hf" else _write_nanogpt(checkpoint, temporary)
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out} cannot be written: {error}; give another directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return note


def _write_hf(checkpoint: Checkpoint, directory: Path, words: int) -> str:
    """words: number of embedding rows to write."""
    shape, weights = checkpoint.state.candidate.shape, {}
    for name, tensor in load_model(checkpoint, _CPU).state_dict().items():
        weights[f"transformer.{name}"] = (tensor.T if name.endswith(_CONV1D) else tensor).contiguous()
        if not shape.bias and name not in ("wte.weight", "wpe.weight"):  # GPT-2 always has biases
            weights[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(len(tensor))
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:words].contiguous()
    save_tensors(weights, directory / "model.safetensors", metadata={"format": "pt"})
    ours = shape.vocab_size >= VOCAB_SIZE
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), END_OF_TEXT if ours else None)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32",
        "activation_function": "gelu",  # GPT-2's own is the tanh approximation, gelu_new
        "vocab_size": words, "n_positions": shape.block_size,
        **{name: getattr(shape, name) for name in ("n_embd", "n_layer", "n_head")},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape.dropout),
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, **ends,
    }  # fmt: skip
    for name, content in (("config.json", config), ("generation_config.json", ends)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    if not ours:
        return f"no tokenizer was written: a vocabulary of {shape.vocab_size} is not GPT-2's"
    files = rank_files()
    (directory / "vocab.json").write_bytes(files["encoder.json"])
    (directory / "merges.txt").write_bytes(files["vocab.bpe"])
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape.block_size}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
    return ""


def _write_nanogpt(checkpoint: Checkpoint, directory: Path) -> str:
    """Write the keys that nanoGPT's train.py saves: tensors, numbers and text only."""
    candidate, state = checkpoint.state.candidate, checkpoint.state
    own = candidate.recipe.optimizer == "adamw"
    recipe = candidate.recipe if own else replace(candidate.recipe, optimizer="adamw")
    step = build(Candidate(recipe=recipe, plan=INFERENCE), _CPU)
    if own:
        checkpoint.restore(step)
    else:
        checkpoint.load_weights(step)
    weights = {f"transformer.{name}": tensor for name, tensor in step.model.state_dict().items()}
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    saved = {
        "model": weights | {"lm_head.weight": weights["transformer.wte.weight"]},
        "optimizer": step.optimizer.state_dict(),
        "model_args": {name: getattr(candidate.shape, name) for name in names},
        "iter_num": state.iteration,
        "best_val_loss": 1e9 if state.best_validation_loss is None else state.best_validation_loss,
        "config": DEFAULTS | nanogpt_values(candidate, "cuda"),
    }
    torch.save(saved, directory / "ckpt.pt")
    return "" if own else f"nanoGPT has no optimizer {candidate.recipe.optimizer}: its AdamW starts with empty moments"


def load_initial(path: Path, model: GPT) -> tuple[str, ...]:
    """Load the weights at `path` into `model`. Returns notes for the user.

    path: nanoGPT's ckpt.pt, a directory of transformers' GPT2LMHeadModel, or a checkpoint, training or run of ours.
    The model may have more vocabulary padding, and fewer positions.
    Raises CheckpointError for files that cannot be read and weights that do not fit or are not finite. Code in the
    files is not executed.
    """
    try:
        weights, heads, notes = read_weights(path)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # torch's reader can raise anything for a damaged file
        reason = one_line(str(error)) or f"it is empty or damaged ({type(error).__name__})"
        raise CheckpointError(f"{path} cannot be read: {reason}; give another --init-from") from None
    check_finite(weights, path)
    if (shape := model.shape).n_head != (heads or shape.n_head):
        raise CheckpointError(f"{path} has another shape: it has {heads} heads; set model.n_head = {heads}")
    advice = _advice(weights, model)
    for name, parameter in model.named_parameters():
        tensor = weights.pop(name, torch.zeros_like(parameter) if name.endswith("bias") else None)
        fitted = None if tensor is None else _fitted(name, tensor.float(), parameter)
        if fitted is None:
            there = "is missing" if tensor is None else f"is {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{path} has another shape: {name} {there}, in the recipe it is {tuple(parameter.shape)}; {advice}"
            )
        with torch.no_grad():
            parameter.copy_(fitted)
    if weights:
        raise CheckpointError(f"{path} has another shape: the recipe has no {min(weights)}; {advice}")
    return f"starting from the weights of {path}", *notes


def _advice(weights: Mapping[str, Tensor], model: GPT) -> str:
    """Advice: the values of [model] that the weights need."""
    words, positions = (weights.get(name, torch.empty(0)) for name in ("wte.weight", "wpe.weight"))
    needed: dict[str, int | bool] = {
        "n_layer": len({name.split(".")[1] for name in weights if name.startswith("h.")}),
        "n_embd": words.shape[-1],
        "block_size": min(len(positions), model.shape.block_size),
        "vocab_size": len(words),
        "bias": any(name.endswith("bias") for name in weights) or model.shape.bias,
    }
    if len(words) >= VOCAB_SIZE:  # padded there and here
        needed["vocab_size"] = max(len(words), model.shape.vocab_size)
    differ = [f"{key} = {value}".lower() for key, value in needed.items() if value and value != vars(model.shape)[key]]
    return f"set {', '.join(differ)} in [model]" if differ else "change [model]"


def read_weights(path: Path) -> tuple[dict[str, Tensor], int | None, tuple[str, ...]]:
    """Weights by our names, the number of heads (None: not in the file), and notes for the user."""
    if path.name == "model.safetensors" or path.name.startswith("pytorch_model"):
        path = path.parent if (path.parent / "config.json").exists() else path
    if path.is_file():
        saved = _load_pickled(path)
        if not isinstance(saved, Mapping) or not isinstance(saved.get("model"), Mapping):
            raise ValueError("it has no table `model`, unlike nanoGPT's ckpt.pt")
        arguments = saved.get("model_args")
        heads = arguments.get("n_head") if isinstance(arguments, Mapping) else None
        return _own_names(saved["model"]), heads if isinstance(heads, int) else None, ()
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a ckpt.pt of nanoGPT, a downloaded folder of GPT-2's config.json and "
            "weights, or a checkpoint"
        )
    if not (path / "config.json").exists():
        checkpoint = find_checkpoint(path)
        return dict(load_model(checkpoint, _CPU).state_dict()), checkpoint.state.candidate.shape.n_head, ()
    return _read_transformers(path)


def _read_transformers(path: Path) -> tuple[dict[str, Tensor], int | None, tuple[str, ...]]:
    config = json.loads((path / "config.json").read_text())
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"its model_type is {kind!r}, only gpt2 is read")
    for key, only in _GPT2.items():
        if config.get(key, only) != only:
            raise ValueError(f"its {key} is {config[key]!r}, and the model here needs {only!r}")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        part = load_file(file) if file.suffix == ".safetensors" else _load_pickled(file)
        if not isinstance(part, Mapping):
            raise ValueError(f"{file.name} holds no table of tensors")
        weights |= part
    own = {n: t.T if n.endswith(_CONV1D) else t for n, t in _own_names(weights).items()}
    activation = config.get("activation_function", "gelu_new")
    notes = () if activation == "gelu" else (f"its activation is {activation}, replaced by the exact gelu",)
    heads = config.get("n_head", 12)
    return own, heads if isinstance(heads, int) else None, notes


def _weight_files(path: Path) -> list[Path]:
    """The files of the weights: safetensors rather than pickles, each as one file or in shards listed by an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).exists():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.exists():
            listed = json.loads(index.read_text())
            shards = listed.get("weight_map") if isinstance(listed, dict) else None
            names = shards.values() if isinstance(shards, dict) else [None]
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in names):
                raise ValueError(f"{index.name} has no weight_map of files in its directory")
            files = [path / shard for shard in sorted(set(names))]
            if missing := [file.name for file in files if not file.exists()]:
                raise ValueError(f"{missing[0]} is missing, which {index.name} lists")
            return files
    raise ValueError("it has neither model.safetensors nor pytorch_model.bin, nor shards of them")


def _load_pickled(path: Path) -> object:
    """Load a file of torch.save with tensors, plain values and numpy numbers. Other objects could run code and are
    refused. Raises CheckpointError with a message of ours, as torch's advises running the code, or OSError."""
    with path.open("rb"):
        pass
    with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rare pickle protocols; unreadable files raise
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            kind = type(error).__name__
        try:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
        except Exception:  # damaged, as above
            foreign = []
    problem = f"is damaged, or not a file of torch.save with tensors and plain values ({kind})"
    if foreign:
        problem = f"holds Python objects ({', '.join(foreign)}), which could run code and are not loaded"
    raise CheckpointError(f"{path} {problem}; give weights saved as torch.save({{'model': model.state_dict()}}, file)")


def _number(kind: np.dtype[Any], content: bytes) -> object:
    """A numpy scalar in a pickle, as a Python number."""
    return np.frombuffer(content, kind)[0].item()


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes in old pickles."""
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return text.encode(encoding)


_NUMPY: list[Any] = [
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"),
    (_bytes, "_codecs.encode"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
]
"""Globals that a pickle needs for numpy numbers; functions of numpy and codecs are replaced by narrower ones."""


def _own_names(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Weights by our names: without wrappers, attention masks of old files, and the head, which is the embedding."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        if own.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {kind}, weights are floating-point tensors")
        if own in named:
            raise ValueError(f"it has {own} twice, under different prefixes")
        named[own] = tensor
    head = named.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, named.setdefault("wte.weight", head)):
        if torch.isfinite(head).all():
            raise ValueError("its lm_head.weight is not its wte.weight, and the model here shares one weight")
        named["lm_head.weight"] = head  # for check_finite to refuse
    return named


def _fitted(name: str, tensor: Tensor, parameter: Tensor) -> Tensor | None:
    """The tensor in the parameter's shape; None if it does not fit."""
    missing = parameter.shape[0] - tensor.shape[0] if tensor.dim() == parameter.dim() else 0
    if name == "wte.weight" and missing > 0 and tensor.shape[0] >= VOCAB_SIZE:
        # padding rows get the mean: zeros would be likelier than any word of a trained GPT-2
        tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(missing, -1)])
    if name == "wpe.weight" and missing < 0:
        tensor = tensor[: parameter.shape[0]]
    return tensor if tensor.shape == parameter.shape else None
