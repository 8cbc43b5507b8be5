"""The plan of a training run and its needs, printed before a weight is loaded."""

import os
from dataclasses import replace

import torch

from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel
from zerotune.models.parameters import model_size
from zerotune.models.pretrained import check_token_ids
from zerotune.run.plan import (
    MemoryNeed,
    describe_bytes,
    describe_memory,
    logit_bytes,
    memory_need,
    offloaded,
    why_not_fit,
)
from zerotune.settings.groups import TrainSettings
from zerotune.training.data import TrainingData
from zerotune.training.schedule import plan_schedule
from zerotune.training.snapshot import bytes_on_node
from zerotune.training.zero_state import BYTES_A_WEIGHT


def plan_training(settings: TrainSettings, config, train: TrainingData, num_labels: int) -> str:
    """Describe a run in a few lines: weights, data, steps and memory.

    Args:
        num_labels: of a classifier.
    Raises:
        Refused: a token has no embedding, or the run will not fit its GPU.
    """
    model, optimisation = settings.model, settings.optimisation
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_token_ids(model.name, config, train.token_ids)
    total, trainable = model_size(config, settings.head, num_labels, model)
    scored_tokens = int(train.lengths.max()) if attention_kernel(model.attention, config) == "eager" else 0
    world = (world_size, offloaded(settings.deepspeed))
    need = memory_need(total, trainable, config, model, optimisation, world, scored_tokens)
    if settings.head == "generate":
        logits = logit_bytes(config, model, optimisation.tokens_per_device, train.answer_share)
        need = replace(need, activations=need.activations + logits)
    _refuse_too_large(settings, need, total)
    weights = f"model: {total:,} weights, {trainable:,} of them trained ({model.method}, {model.precision})"
    saves = _describe_checkpoints(settings, trainable)
    return "\n".join([weights, *_describe_steps(settings, train, world_size), describe_memory(need), saves])


def _refuse_too_large(settings: TrainSettings, need: MemoryNeed, num_weights: int) -> None:
    if not torch.cuda.is_available():
        return
    device_bytes = torch.cuda.mem_get_info()[1]
    # a generator is evaluated in the run's precision, heads on float32 weights
    precision = settings.model.precision if settings.head == "generate" else "fp32"
    final_bytes = num_weights * (4 if precision == "fp32" else 2)
    if settings.model.method == "full" and final_bytes > device_bytes:
        raise Refused(
            f"--method full ends by evaluating final/, whose {precision} weights take {final_bytes / 2**30:.0f} "
            f"GiB, and a device has {device_bytes / 2**30:.0f} GiB: use --method lora or qlora"
        )
    problem = why_not_fit(need, device_bytes, settings.model.method)
    if problem:
        raise Refused(problem)


def _describe_checkpoints(settings: TrainSettings, num_trainable: int) -> str:
    """Return the size of a checkpoint and of its copy. Less where an embedding trains only the rows in use."""
    every = settings.run.checkpoint_every
    often = f"every {every.steps} steps" if every.minutes is None else f"every {every.minutes:g} minutes"
    num_bytes = num_trainable * BYTES_A_WEIGHT
    line = f"checkpoints: up to {describe_bytes(num_bytes)} each, {often}"
    if settings.run.scratch_dir:
        return f"{line}, by way of {settings.run.scratch_dir}"
    copied = bytes_on_node(num_bytes, settings.deepspeed is not None)
    return f"{line}; a copy of {describe_bytes(copied)} in the host memory of a node while one is written"


def _describe_steps(settings: TrainSettings, train: TrainingData, world_size: int) -> list[str]:
    if not settings.run.plan:
        return []  # cutting an epoch takes a moment
    optimisation = settings.optimisation
    schedule = plan_schedule(optimisation, settings.run, len(train.ids))
    steps = train.epoch_steps(optimisation.batch_size, optimisation.seed, epoch=0)
    cuts = [train.micro_batches(step, optimisation.tokens_per_device, world_size) for step in steps]
    micro = [batch for ranks in cuts for rank in ranks for batch in rank if len(batch)]
    num_passes = sum(len(ranks[0]) for ranks in cuts)
    num_tokens, num_padded = sum(map(train.num_tokens, micro)), sum(map(train.num_padded_tokens, micro))
    return [
        f"data: {len(train.ids):,} rows, {num_tokens:,} tokens, {num_padded / num_tokens:.3f} × with padding",
        f"steps: {schedule.num_steps:,} of {optimisation.batch_size} rows on {world_size} device(s), "
        f"{schedule.steps_per_epoch:,} an epoch, {num_passes / len(steps):.2f} micro-batches a step",
    ]
