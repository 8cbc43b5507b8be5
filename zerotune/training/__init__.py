"""The training loop, its steps and its checkpoints, and the same run with the Hugging Face Trainer."""
