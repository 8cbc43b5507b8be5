"""The loop, its step and its checkpoints; beside them the Hugging Face Trainer on the same run."""
