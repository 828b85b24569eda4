"""Text from a trained model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from autotune.config.candidate import Plan, at_least
from autotune.config.train_settings import CHECKPOINTS, TRAINING
from autotune.data.tokenizer import END_OF_TEXT, VOCAB_SIZE, decode, encode
from autotune.data.vocabulary import META, data_vocabulary, read_meta
from autotune.errors import CheckpointError, ConfigError
from autotune.model.checkpoint import Checkpoint, checkpoints, latest_good, read_checkpoint
from autotune.model.gpt import GPT
from autotune.model.step import build

INFERENCE = Plan(micro_batch_size=1, compile="off", dtype="float32")
"""torch's own kernels, whatever plan the model was trained with."""


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
    """`prompt` and its continuation, up to `tokens` more tokens or the end of the text.

    path: a checkpoint, or a training directory or run, whose newest undamaged checkpoint is used.
    temperature 0 takes the likeliest token; top_k 0 draws from all tokens. Equal arguments give equal text.
    Raises CheckpointError without an undamaged checkpoint, ConfigError for a number out of range or a vocabulary
    without text, DataError for a prompt with characters that the training data lacks.
    """
    at_least("--tokens", tokens, 1)
    at_least("--temperature", temperature, 0)
    at_least("--top-k", top_k, 0)
    checkpoint = find_checkpoint(path)
    text = _coding(checkpoint)
    model = load_model(checkpoint, torch.device(device))
    generator = torch.Generator(device).manual_seed(seed)
    given = text.encode(prompt)
    front = text.start or (() if given else text.empty)  # not returned
    ids = [*front, *given]
    allowed = torch.tensor(text.ids, device=device)
    for _ in range(tokens):
        window = torch.tensor([ids[-model.shape.block_size :]], device=device)  # (1, T)
        following = text.ids[_draw(model.next_logits(window)[0][allowed], temperature, top_k, generator)]
        if following == text.end:
            break
        ids.append(following)
    return text.decode(ids[len(front) :])


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Conversion between text and a model's tokens."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    ids: list[int]
    """Tokens with text; the vocabulary's padding is never drawn."""
    start: tuple[int, ...] = ()
    """Tokens at the start of each training document."""
    empty: tuple[int, ...] = ()
    """Tokens to start from without `start` and prompt."""
    end: int | None = None
    """Token that ends a text."""


def _coding(checkpoint: Checkpoint) -> Coding:
    """The vocabulary of the training data: that of its `meta.pkl`, else GPT-2's."""
    recipe = checkpoint.state.candidate.recipe
    words, data = recipe.shape.vocab_size, Path(recipe.data or ".")
    if recipe.data and (meta := read_meta(data)):
        if not meta.itos:
            raise ConfigError(f"{meta.path} has no itos, so ids cannot be shown as text")
        if meta.vocab_size > words:
            raise ConfigError(
                f"{meta.path} has {meta.vocab_size} words, {checkpoint.path} only {words}; it has been replaced since"
            )
        newline = meta.stoi.get("\n", min(meta.itos))  # nanoGPT's sample.py starts with a line break
        return Coding(encode=meta.encode, decode=meta.decode, ids=sorted(meta.itos), empty=(newline,))
    if words < VOCAB_SIZE:
        raise ConfigError(
            f"{checkpoint.path} has a vocabulary of {words}; text needs GPT-2's {VOCAB_SIZE} tokens, "
            f"or a {META} with itos and stoi in its data directory ({recipe.data or 'none'})"
        )
    if recipe.data and data.is_dir() and (other := data_vocabulary(data)):
        raise ConfigError(f"{checkpoint.path} was trained on {other[1]}; only GPT-2's tokens or a {META} are read")
    return Coding(
        encode=lambda text: encode(text).tolist(),
        decode=decode,
        ids=list(range(VOCAB_SIZE)),
        start=(END_OF_TEXT,),
        end=END_OF_TEXT,
    )


def find_checkpoint(path: Path) -> Checkpoint:
    """The verified checkpoint in a checkpoint's directory, a training directory or a run. Raises CheckpointError."""
    if (path / "state.json").exists():
        return read_checkpoint(path)
    for directory in (path, path / CHECKPOINTS, path / TRAINING / CHECKPOINTS):
        if checkpoints(directory):
            return latest_good(directory)[0]
    raise CheckpointError(f"{path} holds no checkpoint; give a run, a training directory or a checkpoint step_…")


def load_model(checkpoint: Checkpoint, device: torch.device) -> GPT:
    """The checkpoint's model, for inference."""
    step = build(replace(checkpoint.state.candidate, plan=INFERENCE), device)
    checkpoint.load_weights(step)
    return step.model.eval()


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """logits (V,) -> index of the drawn token."""
    logits = logits.float()
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        lowest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
