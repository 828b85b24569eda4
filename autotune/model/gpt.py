"""GPT-2 as in nanoGPT: learned positions, LayerNorm without bias, GELU, the head tied to the embedding.

B: sequences, T: tokens per sequence, C: n_embd, V: vocab_size. Weights are float32; matrix products run in
the dtype of the surrounding autocast. The forward returns the loss only: a compiled function that also
returned the (B, T, V) logits would have to keep them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.config.candidate import Shape

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(B, n_head, T, head_size) three times and the dropout -> (B, n_head, T, head_size)."""

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""hidden (N, C), weight (V, C), targets (N,), chunk_tokens -> mean cross entropy."""

RunBlock = Callable[[int, nn.Module, Tensor], Tensor]
"""(layer, block, input) -> output of the block. May keep less for the backward than a plain call."""


class CausalSelfAttention(nn.Module):
    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.n_head, self.dropout, self.attention = shape.n_head, shape.dropout, attention
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.c_attn(x).view(batch, tokens, 3, self.n_head, width // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        mixed = self.attention(query, key, value, self.dropout if self.training else 0.0)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)  # (B, T, C)
        projected: Tensor = self.c_proj(mixed)
        return F.dropout(projected, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = CausalSelfAttention(shape, attention)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """nanoGPT's model with its parameter names, so that weights are exchangeable."""

    def __init__(
        self,
        shape: Shape,
        *,
        attention: Attention,
        loss: Loss,
        loss_chunk_tokens: int,
        run_block: RunBlock,
        residual_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.loss, self.residual_dtype = shape, loss, residual_dtype
        self.loss_chunk_tokens, self.run_block = loss_chunk_tokens, run_block
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)  # also the head
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(Block(shape, attention) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self._initialise()

    def _initialise(self) -> None:
        # GPT-2: normal(0.02); projections into the residual path are scaled down with depth
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.shape.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> the last layer's normed output (B, T, C)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = (self.wte(tokens) + self.wpe(positions)).to(self.residual_dtype)  # (B, T, C)
        x = F.dropout(x, self.shape.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = self.run_block(layer, block, x) if self.training else block(x)
        normed: Tensor = self.ln_f(x)
        return normed

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens and targets (B, T), -1 for targets to ignore -> mean loss, a scalar."""
        hidden = self.hidden(tokens).flatten(0, 1)  # (B * T, C)
        loss: Tensor = self.loss(hidden, self.wte.weight, targets.flatten(), self.loss_chunk_tokens)
        return loss

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits of the token after the last one (B, V), for sampling."""
        return F.linear(self.hidden(tokens)[:, -1], self.wte.weight)
