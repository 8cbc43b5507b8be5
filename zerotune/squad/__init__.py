"""SQuAD v2, all of it: rows, windows, span selection, shared paragraphs, prompts, writing, the official scorer."""
