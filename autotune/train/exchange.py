"""Weights for others and from them: nanoGPT's ckpt.pt, and GPT-2 directories of Hugging Face's transformers."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotune.config.candidate import Candidate, one_of
from autotune.config.nanogpt import DEFAULTS, nanogpt_values
from autotune.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, rank_files
from autotune.errors import CheckpointError, ConfigError, one_line
from autotune.model.checkpoint import Checkpoint
from autotune.model.gpt import GPT
from autotune.model.step import build
from autotune.train.sample import INFERENCE, find_checkpoint, load_model

_CPU = torch.device("cpu")
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""What transformers keeps as (in, out), the transpose of a linear layer's weight."""


def export(path: Path, to: str, out: Path) -> str:
    """Write the checkpoint at `path` (or the newest of a training or run) into a new directory `out`; a note, or "".

    hf: config.json, model.safetensors and GPT-2's tokenizer, for `GPT2LMHeadModel.from_pretrained(out)`.
    nanogpt: ckpt.pt, for nanoGPT's sample.py and its train.py --init_from=resume.
    Raises ConfigError or CheckpointError, leaving nothing behind.
    """
    one_of("--to", to, ("hf", "nanogpt"))
    found = find_checkpoint(path)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; give a new directory")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        note = _write_hf(found, temporary) if to == "hf" else _write_nanogpt(found, temporary)
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out {out} cannot be written: {error}; give another directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return note


def _write_hf(found: Checkpoint, directory: Path) -> str:
    shape, weights = found.state.candidate.shape, {}
    for name, tensor in load_model(found, _CPU).state_dict().items():
        weights[f"transformer.{name}"] = (tensor.T if name.endswith(_CONV1D) else tensor).contiguous()
        if not shape.bias and name not in ("wte.weight", "wpe.weight"):  # GPT-2 cannot do without biases
            weights[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(len(tensor))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    ours = shape.vocab_size >= VOCAB_SIZE
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu",  # GPT-2's own is the tanh approximation, gelu_new
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT if ours else None,
        "eos_token_id": END_OF_TEXT if ours else None,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not ours:
        return f"no tokenizer was written: a vocabulary of {shape.vocab_size} is not GPT-2's"
    files = rank_files()
    (directory / "vocab.json").write_bytes(files["encoder.json"])
    (directory / "merges.txt").write_bytes(files["vocab.bpe"])
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape.block_size}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
    return ""


def _write_nanogpt(found: Checkpoint, directory: Path) -> str:
    """The keys that nanoGPT's train.py saves, all of them tensors, numbers and text."""
    candidate, state = found.state.candidate, found.state
    own = candidate.recipe.optimizer in ("adamw", "adamw_unfused")
    recipe = candidate.recipe if own else replace(candidate.recipe, optimizer="adamw")
    step = build(Candidate(recipe=recipe, plan=INFERENCE), _CPU)
    if own:
        found.restore(step)
    else:
        found.load_weights(step.model)
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
    return "" if own else f"nanoGPT has no optimizer {candidate.recipe.optimizer}: its AdamW will begin anew"


def load_initial(path: Path, model: GPT) -> tuple[str, ...]:
    """Put the weights at `path` into `model`; what to say about it.

    path: nanoGPT's ckpt.pt, a directory of transformers' GPT2LMHeadModel, or a checkpoint, training or run of ours.
    A vocabulary that was padded more since, or positions that are needed no longer, are no difference.
    Raises CheckpointError for what cannot be read or does not fit. Nothing is executed.
    """
    try:
        weights, notes = _read(path)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # of a file of any content, torch's reader can raise anything
        reason = one_line(str(error)) or f"it is empty or damaged ({type(error).__name__})"
        raise CheckpointError(f"{path} cannot be read: {reason}; give another --init-from") from None
    for name, parameter in model.named_parameters():
        tensor = weights.pop(name, torch.zeros_like(parameter) if name.endswith("bias") else None)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} cannot be read: {name} is no tensor; give another --init-from")
        fitted = None if tensor is None else _fitted(name, tensor.float(), parameter)
        if fitted is None:
            there = "is missing" if tensor is None else f"is {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{path} is of another shape: {name} {there}, the recipe's is {tuple(parameter.shape)}; change [model]"
            )
        with torch.no_grad():
            parameter.copy_(fitted)
    if weights:
        raise CheckpointError(f"{path} is of another shape: the recipe has no {min(weights)}; change [model]")
    return f"beginning with the weights of {path}", *notes


def _read(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights by our names, and what to say about them."""
    if path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, Mapping) or not isinstance(saved.get("model"), Mapping):
            raise ValueError("it has no table `model`, as a ckpt.pt of nanoGPT has")
        return _own_names(saved["model"]), ()
    if not (path / "config.json").exists():
        return dict(load_model(find_checkpoint(path), _CPU).state_dict()), ()
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") != "gpt2":
        raise ValueError(f"its model_type is {config.get('model_type')!r}, only gpt2 is read")
    weights = _own_names(load_file(path / "model.safetensors"))
    activation = config.get("activation_function", "gelu_new")
    notes = () if activation == "gelu" else (f"its activation is {activation}, it goes on with the exact gelu",)
    return {name: tensor.T if name.endswith(_CONV1D) else tensor for name, tensor in weights.items()}, notes


def _own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the head, which is the embedding, and without attention masks, which old files hold."""
    named = {str(name).removeprefix("_orig_mod.").removeprefix("transformer."): t for name, t in weights.items()}
    return {n: t for n, t in named.items() if n != "lm_head.weight" and not n.endswith((".attn.bias", ".masked_bias"))}


def _fitted(name: str, tensor: Tensor, parameter: Tensor) -> Tensor | None:
    """The tensor in the parameter's shape; None where that is another one."""
    missing = parameter.shape[0] - tensor.shape[0] if tensor.dim() == parameter.dim() else 0
    if name == "wte.weight" and missing > 0 and tensor.shape[0] >= VOCAB_SIZE:
        # rows for padding: the mean, as zeros would be likelier than any word of a trained GPT-2
        tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(missing, -1)])
    if name == "wpe.weight" and missing < 0:
        tensor = tensor[: parameter.shape[0]]
    return tensor if tensor.shape == parameter.shape else None
