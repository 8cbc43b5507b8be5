"""From rows to token ids, and from token ids to steps and micro-batches."""
