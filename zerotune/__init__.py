"""zerotune: fine-tune and evaluate 1B-7B language models on SST-2, IMDB and SQuAD v2 with plain scripts."""

__version__ = "0.1.0"
