"""zerotune: fine-tune and evaluate 1B-7B language models on SST-2 with plain scripts, from a laptop to a cluster."""

__version__ = "0.1.0"
