"""How benchmarks drive zerotune: its engine around a random model, its steps, plan, checkpoints, scoring and writing.

When the library's interfaces change, only this module has to follow.
"""

from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional

from zerotune.models.classifier import SequenceClassifier
from zerotune.models.generator import TextGenerator
from zerotune.models.parameters import parameter_groups, parameter_table
from zerotune.models.shared_prefix import SharedRows
from zerotune.models.used_rows import train_used_rows
from zerotune.run.launch import start_accelerator
from zerotune.run.plan import Sharding, memory_need
from zerotune.settings.deepspeed import fill_deepspeed_config, read_deepspeed_config
from zerotune.settings.groups import ModelSettings
from zerotune.squad.generation import GenerationData
from zerotune.squad.writing import greedy_writer
from zerotune.tasks.prompts import PromptData
from zerotune.training import checkpoints
from zerotune.training.background import BackgroundSaves
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.progress import Progress
from zerotune.training.snapshot import Waiting
from zerotune.training.step_counts import BatchShape, count_step

PEAK_RATE, HEAD_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 5e-5, 0.01, 1.0


def build_engine(
    model: nn.Module, settings: ModelSettings, used_ids: np.ndarray | None, deepspeed: Path | None = None
) -> Engine:
    """Build the engine of train/sst2.py around a stock or peft model (random_models.random_model).

    Args:
        used_ids: the token ids that training reads, for a classifier; None makes a generator, which trains all of them.
        deepspeed: a file of ds_configs/.
    """
    accelerator = fresh_accelerator(deepspeed, settings.precision)
    tuned = TextGenerator(model) if used_ids is None else SequenceClassifier(model)
    if used_ids is not None:
        train_used_rows(tuned.stock_model, used_ids)
    groups = parameter_groups(tuned, PEAK_RATE, HEAD_RATE, WEIGHT_DECAY)
    optimizer = build_optimizer("adamw", groups, accelerator.device.type)
    engine = Engine(accelerator, tuned, optimizer, settings.precision, MAX_GRAD_NORM)
    engine.model.train()
    return engine


def fresh_accelerator(deepspeed: Path | None = None, precision: str = "bf16"):
    """Return the library's Accelerator, whatever the Trainer or an earlier engine has left in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    filled = None
    if deepspeed is not None:
        filled = fill_deepspeed_config(read_deepspeed_config(deepspeed), MAX_GRAD_NORM, precision)
    return start_accelerator(filled)


def classifier_inputs(data, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arguments of a SequenceClassifier for some examples, padded."""
    return data.inputs(rows, device)


def optimizer_step(engine: Engine, data, rows: np.ndarray, tokens_per_device: int) -> torch.Tensor:
    """Take one step on some examples as a train script's loop does. Returns its mean loss, a float32 scalar on the
    device."""
    num_targets = data.num_targets(rows)
    (micros,) = data.micro_batches(rows, tokens_per_device, 1)
    for number, micro in enumerate(micros):
        loss = micro_batch(engine, data.batch(micro, engine.accelerator.device), num_targets)
        engine.backward(loss, is_last=number == len(micros) - 1)
    engine.update(1.0)
    loss, _ = engine.take_loss_and_norm()
    return loss


def micro_batch(engine: Engine, batch, num_targets: float) -> torch.Tensor:
    """Return a micro-batch's part of its step's mean loss, a float32 scalar with its graph.

    Args:
        batch: from the data's `batch`.
        num_targets: of the whole step.
    """
    logits = engine.forward(**batch.inputs)
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum") / num_targets


def weight_counts(model: nn.Module) -> dict:
    """Return {"total", "trainable", "groups": {"attention", "mlp", "adapter" …}} of a stock, peft or tuned model."""
    return parameter_table(model)


def useful_flops(counts: dict) -> int:
    """Return the useful floating-point operations for a real token.

    6 for each trained matrix weight (2 forward, 2 for the gradient of the input, 2 for that of the weight; Kaplan et
    al. 2020, section 2.1), 4 for each frozen one. Embeddings, head, padding, attention scores and recomputation do not
    count; work that a faster way skips still does.

    Args:
        counts: from `weight_counts`.
    """
    groups = counts["groups"]
    backbone = groups["attention"] + groups["mlp"]
    return 4 * backbone + 6 * groups["adapter"] if groups["adapter"] else 6 * backbone


def planned_bytes(config, settings: ModelSettings, tokens: int, longest: int, used_ids: np.ndarray | None) -> float:
    """Return the plan's memory for a device, without the CUDA context, for a classifier and a step of one micro-batch.

    Args:
        tokens: padded tokens of the micro-batch.
        longest: tokens of its longest row.
        used_ids: token ids that training reads.
    """
    rows = max(1, tokens // longest)
    batch = BatchShape(rows, longest, rows * longest, is_alone=True)
    counts = count_step(config, settings, "classify", 2, batch, torch.cuda.is_available(), used_ids)
    sizes = counts.peaks, counts.table, counts.largest_layer
    return memory_need(*sizes, settings, "adamw", Sharding(), on_gpu=False).total


def save_checkpoint(engine: Engine, root: Path) -> Path:
    """Save a checkpoint as the loop does: written to disk, hashed and marked as complete."""
    record = {"run_id": "benchmark", "step": 1, "progress": asdict(Progress(step=1)), "num_processes": 1}
    folder, saves = checkpoints.step_folder(root, 1), BackgroundSaves(Waiting(), 1, engine.accelerator)
    saves.start(folder, record, engine.state_files(), engine.checkpoint_bytes())
    saves.close()
    return folder


def load_checkpoint(engine: Engine, folder: Path) -> None:
    """Hash a checkpoint and load it, as --resume does."""
    problem = checkpoints.defect(folder)
    assert problem is None, problem
    engine.load(folder)


def prompt_data(head: Sequence[int], tails: list[Sequence[int]], answers: list[int]) -> PromptData:
    """Return prompts that begin with the same tokens; each of `answers` is a single token."""
    rows = SharedRows()
    for tail in tails:
        rows.append([*head, *tail])
    return PromptData(rows, [answers] * len(tails), len(answers), True, 0, num_shared=len(head), num_truncated=0)


@torch.no_grad()
def score_prompts(model: nn.Module, data: PromptData, batches: list[np.ndarray], device: torch.device) -> np.ndarray:
    """Return the answers' log-likelihoods up to a constant for each prompt, float32 [prompts, answers]."""
    prefix = data.prefix(model, device)
    scores = np.empty((len(data.rows), data.num_labels), dtype=np.float32)
    for items in batches:
        scores[items] = data.log_likelihoods(model, items, device, prefix)
    return scores


def question_data(contexts: list, context_of: np.ndarray, questions: list, answers: list) -> GenerationData:
    """Return questions about contexts with their answers, all given as arrays of token ids."""
    ids = [str(number) for number in range(len(questions))]
    return GenerationData(ids, None, array("i"), contexts, context_of, questions, answers, pad_id=0, num_truncated=0)


def write_answers(
    model: nn.Module, data: GenerationData, max_new_tokens: int, tokens_per_device: int, device: torch.device
) -> int:
    """Write an answer to every question, none of which ends early. Returns how many tokens were written."""
    writer = greedy_writer(model, data, [], max_new_tokens, device)
    return sum(len(record["tokens"]) for batch in data.writing_batches(tokens_per_device) for record in writer(batch))
