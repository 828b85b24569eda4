"""The memory guide that circulates among nanoGPT users: its rows and claims, each also as a config file of nanoGPT."""

from dataclasses import dataclass

from autotune.config.candidate import Shape
from autotune.errors import ConfigError, shown, suggest
from autotune.units import GIB

ADVISED_TOKENS = 50_000_000_000
"""The guide's advice for the length of any training."""


@dataclass(frozen=True, kw_only=True)
class GuideRow:
    """A configuration that the guide advises for a card, and what it claims."""

    name: str
    """As `--guide` calls it."""
    cards: str
    """The guide's words."""
    card: str
    """The one of them that predictions are for."""
    memory_bytes: int
    """Memory of the smallest card that the row is for."""
    claimed: str
    """Parameters of the model according to the guide."""
    claimed_memory: str = ""
    claimed_tokens: str = ""
    shape: Shape
    micro_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float = 6e-4
    max_iters: int = 50_000

    @property
    def config(self) -> str:
        """The row as a config file of nanoGPT."""
        shape = self.shape
        values = {
            "n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size,
            "batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps, "learning_rate": self.learning_rate,
            "max_iters": self.max_iters, "lr_decay_iters": self.max_iters, "warmup_iters": self.max_iters // 25,
            "min_lr": 6e-5, "beta2": 0.99, "eval_interval": 1000, "eval_iters": 200, "log_interval": 100,
            "dataset": "fineweb",
        }  # fmt: skip
        if shape.vocab_size != Shape().vocab_size:  # otherwise the data's, as in nanoGPT
            values["vocab_size"] = shape.vocab_size
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())


def _shape(layers: int, width: int) -> Shape:
    return Shape(n_layer=layers, n_head=layers, n_embd=width)


GUIDE = (
    GuideRow(
        name="80GB", cards="A100/H100", card="A100 80GB SXM", memory_bytes=80 * GIB, claimed="~350M",
        shape=_shape(12, 768), micro_batch_size=64, gradient_accumulation_steps=8, learning_rate=5e-4,
    ),
    GuideRow(
        name="48GB", cards="A6000", card="RTX A6000", memory_bytes=48 * GIB, claimed="~250-300M",
        shape=_shape(12, 672), micro_batch_size=32, gradient_accumulation_steps=16,
    ),
    GuideRow(
        name="24GB", cards="4090/3090", card="RTX 4090", memory_bytes=24 * GIB, claimed="~160-200M",
        claimed_memory="20-22 GB", claimed_tokens="~83B",
        shape=_shape(10, 640), micro_batch_size=32, gradient_accumulation_steps=16,
    ),
    GuideRow(
        name="16GB", cards="4080", card="RTX 4080", memory_bytes=16 * GIB, claimed="~125M",
        shape=_shape(8, 512), micro_batch_size=32, gradient_accumulation_steps=12,
    ),
    GuideRow(
        name="12GB", cards="4070 Ti", card="RTX 4070 Ti", memory_bytes=12 * GIB, claimed="~84M",
        shape=_shape(6, 384), micro_batch_size=16, gradient_accumulation_steps=24,
    ),
)  # fmt: skip
"""One row for each class of memory, largest first. The one for 24 GB is also the first of the two files below."""

LARGER_24GB = GuideRow(
    name="24GB-large", cards="4090/3090", card="RTX 4090", memory_bytes=24 * GIB, claimed="~350M",
    shape=_shape(12, 768), micro_batch_size=32, gradient_accumulation_steps=16, learning_rate=5e-4, max_iters=60_000,
)  # fmt: skip
"""The guide's second config file for 24 GB, 'even better'."""

PRESETS = (*GUIDE, LARGER_24GB)


def guide_row(memory_bytes: int) -> GuideRow:
    """The guide's row for a card with this much memory. Cards report up to 5 % less than their nominal size: a 24 GB
    card has 23.6 GiB."""
    return next((row for row in GUIDE if memory_bytes * 1.05 >= row.memory_bytes), GUIDE[-1])


def preset(name: str) -> GuideRow:
    """The row that `--guide` names. Raises ConfigError."""
    rows = {row.name: row for row in PRESETS}
    wanted = {key.lower(): key for key in rows}.get(name.lower().replace(" ", ""))
    if wanted is None:
        raise ConfigError(f"--guide {shown(name)} is not a row of the guide; {suggest(name, rows)}")
    return rows[wanted]
