"""From text to batches: sources, the held-out split, the tokenizer, packed tokens, a seeded global order."""
