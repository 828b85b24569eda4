"""Text from a trained model."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autotune.config.candidate import Plan, at_least
from autotune.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, decode, encode
from autotune.errors import CheckpointError, ConfigError
from autotune.model.checkpoint import Checkpoint, checkpoints, latest_good, read_checkpoint
from autotune.model.gpt import GPT
from autotune.model.step import build
from autotune.train.settings import CHECKPOINTS

INFERENCE = Plan(micro_batch_size=1, compile="off", dtype="float32")
"""By torch's own kernels, whatever plan trained it."""


def sample(
    path: Path,
    *,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
    device: str = "cpu",
) -> str:
    """`prompt` and what the model makes of it, up to `tokens` more tokens or the end of the text.

    path: a checkpoint, a training directory or a run; of the latter two the newest good checkpoint.
    temperature 0 takes the likeliest token each time; top_k 0 allows all of them. Equal arguments give equal text.
    Raises CheckpointError for no whole checkpoint, ConfigError for a number out of range.
    """
    at_least("--tokens", tokens, 1)
    at_least("--temperature", temperature, 0)
    at_least("--top-k", top_k, 0)
    found = find_checkpoint(path)
    words = found.state.candidate.shape.vocab_size
    if words < VOCAB_SIZE:
        raise ConfigError(f"{found.path} has a vocabulary of {words}; text needs GPT-2's {VOCAB_SIZE} tokens")
    model = load_model(found, torch.device(device))
    generator = torch.Generator(device).manual_seed(seed)
    ids = [END_OF_TEXT, *encode(prompt).tolist()]  # documents begin with it in training
    for _ in range(tokens):
        window = torch.tensor([ids[-model.shape.block_size :]], device=device)  # (1, T)
        following = _draw(model.next_logits(window)[0], temperature, top_k, generator)
        if following == END_OF_TEXT:
            break
        ids.append(following)
    return decode(ids[1:])


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's directory, a training directory or a run -> a verified checkpoint. Raises CheckpointError."""
    if (path / "state.json").exists():
        return read_checkpoint(path)
    for directory in (path, path / CHECKPOINTS, path / "train" / CHECKPOINTS):
        if checkpoints(directory):
            return latest_good(directory)[0]
    raise CheckpointError(f"{path} holds no checkpoint; give a run, a training directory or a checkpoint step_…")


def load_model(found: Checkpoint, device: torch.device) -> GPT:
    """The checkpoint's model for inference."""
    step = build(replace(found.state.candidate, plan=INFERENCE), device)
    found.load_weights(step.model)
    return step.model.eval()


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """logits (V,) -> the id of the next token; the vocabulary's padding is never drawn."""
    logits = logits[:VOCAB_SIZE].float()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        lowest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
