"""Everything for SQuAD v2: rows, windows, span selection, shared paragraphs, prompts, writing, the official scorer."""
