"""FineWeb and other sources -> GPT-2 tokens -> shards -> deterministic batches. Imports no torch."""
