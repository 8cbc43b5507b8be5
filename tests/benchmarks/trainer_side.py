"""transformers.Trainer as the benchmarks drive it: like the examples by default, or with its best flags for a CPU."""

import time

from transformers import TrainerCallback, TrainingArguments

BEST_FLAGS = {"bf16": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}


def training_arguments(args, folder: str, weight_decay: float, warmup_ratio: float) -> TrainingArguments:
    """Return arguments for one epoch that saves and reports nothing.

    Args:
        args: batch_size, learning_rate, seed, max_steps (None: the whole epoch), way ("default" or "best").
    """
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=args.learning_rate,
        weight_decay=weight_decay,
        warmup_steps=warmup_ratio,
        num_train_epochs=1,
        max_steps=args.max_steps or -1,
        seed=args.seed,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        # workers would compete with the arithmetic for the same few cores, and a row has only a dozen numbers
        dataloader_num_workers=0,
        **(BEST_FLAGS if args.way == "best" else {}),
    )


class Timing(TrainerCallback):
    """Records when the first step began and the last ended, in seconds of time.perf_counter."""

    started = ended = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()
