"""From a checkpoint to a model with its head and adapter, and back to a folder that loads without zerotune."""
