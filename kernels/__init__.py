"""Interchangeable implementations of attention and of the loss; `registry` lists them.

Nothing here imports the rest of the package. Each file holds one implementation:

- attention: `(query, key, value)` of (B, n_head, T, head_size) and `dropout` -> (B, n_head, T, head_size), causal
- loss: `hidden` (N, n_embd), `weight` (vocab_size, n_embd), `targets` (N,) with -1 for "ignore" and
  `chunk_tokens` -> the mean cross entropy over the targets that count, a float32 scalar
"""
