"""Optimizers and the learning rate of a step."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from autotune.config.candidate import Recipe

MOMENTUM = 0.95
"""Momentum of Muon: its author's value and torch's default."""


def by_muon(name: str, weight: Tensor) -> bool:
    """Whether Muon would update it: a matrix of a block."""
    return weight.dim() >= 2 and name.startswith("h.")


def make_optimizer(
    model: nn.Module, recipe: Recipe, own: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer. Matrices and embeddings have weight decay, norms and biases have none, as in nanoGPT.
    `own`: what this process updates, by the weights' names; None: all."""
    named = dict(model.named_parameters())
    own = named if own is None else own
    blocks = [own[name] for name, p in named.items() if name in own and by_muon(name, p)]
    embeddings = [own[name] for name, p in named.items() if name in own and p.dim() >= 2 and not by_muon(name, p)]
    vectors = {"params": [own[name] for name, p in named.items() if name in own and p.dim() < 2], "weight_decay": 0.0}
    rate, decay = recipe.learning_rate, recipe.weight_decay
    betas = (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "muon":
        of_blocks = Muon([{"params": blocks}], lr=rate, weight_decay=decay, momentum=MOMENTUM)
        others = [{"params": embeddings, "weight_decay": decay}, vectors]
        return CombinedOptimizer(of_blocks, torch.optim.AdamW(others, lr=rate, betas=betas, fused=True))
    groups = [{"params": [*embeddings, *blocks], "weight_decay": decay}, vectors]
    if recipe.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=rate, betas=betas)
        return eight_bit
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class Muon(torch.optim.Muon):
    """torch's Muon with `adjust_lr_fn="match_rms_adamw"`, by which one learning rate serves AdamW and Muon (Liu et al.,
    Muon is Scalable for LLM Training, arXiv:2502.16982). On the CPU it orthogonalises in float32: torch does so in
    bfloat16, which takes thirty times as long where the processor has no instructions for it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                mean = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(  # nothing of the update outlives this line: it is a peak of memory
                    _orthogonal(weight.grad.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"]),
                    alpha=-0.2 * math.sqrt(max(weight.shape)) * rate,
                )


def _orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Nearly the closest orthogonal matrix, by a Newton-Schulz iteration that leaves singular values between about 0.7
    and 1.2 (Jordan et al., https://kellerjordan.github.io/posts/muon). `matrix` may be overwritten."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    matrix = matrix.T if tall else matrix
    matrix.div_(matrix.norm().clamp(min=1e-7))
    for _ in range(steps):
        gram = matrix @ matrix.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        matrix = torch.addmm(matrix, gram, matrix, beta=a)
    return matrix.T if tall else matrix


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters as one: one list of groups and one state. A loss scaler so skips
    the step of all of them, whichever's gradient has overflowed."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces groups and state
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups, part.state = list(islice(groups, len(part.param_groups))), self.state


def learning_rate(recipe: Recipe, iteration: float) -> float:
    """Learning rate at `iteration` steps: linear warm-up, then decay from `learning_rate` to `min_lr` at
    `lr_decay_iters`.

    `cosine` is nanoGPT's get_lr; `wsd` stays level and decays linearly over the last `decay_share` (Hu et al., MiniCPM,
    arXiv:2404.06395; linearly over a fifth: Haegele et al., arXiv:2405.18392).
    """
    if iteration < recipe.warmup_iters:
        return recipe.learning_rate * (iteration + 1) / (recipe.warmup_iters + 1)
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if iteration >= recipe.lr_decay_iters:
        return recipe.min_lr
    span = recipe.learning_rate - recipe.min_lr
    if recipe.schedule == "wsd":
        return recipe.min_lr + span * min(1.0, (1 - iteration / recipe.lr_decay_iters) / recipe.decay_share)
    progress = (iteration - recipe.warmup_iters) / (recipe.lr_decay_iters - recipe.warmup_iters)
    return recipe.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * span
