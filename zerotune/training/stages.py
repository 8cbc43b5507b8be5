"""The stages of a training run, of a classifier or a generator, in the order in which train/sst2.py goes through it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.evaluation.scoring import score_items
from zerotune.files import json_sha256, read_json, read_json_lines
from zerotune.metrics.labels import confusion_matrix, confusion_scores
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator
from zerotune.models.heads import TunedModel
from zerotune.models.loading import ModelSettings, load_classifier, parameter_groups
from zerotune.models.model_files import model_identity
from zerotune.models.parameters import format_table, parameter_table, published_table
from zerotune.models.span_head import load_span_model
from zerotune.models.used_rows import UsedRowsEmbedding, restore_whole_embedding, train_used_rows, unused_decay
from zerotune.run.folder import FREE_FLAGS, RunFolder, held_results, recorded_flags
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.run.process import is_main_process, say
from zerotune.squad.span_data import SpanData
from zerotune.tasks.splits import Splits
from zerotune.training import checkpoints
from zerotune.training.batches import evaluation_batches
from zerotune.training.classification import LabelledData
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.generation import AnswerData
from zerotune.training.loop import Loop
from zerotune.training.schedule import Schedule


def start_run(
    run: RunFolder,
    args,
    splits: Splits,
    data: dict[str, LabelledData] | dict[str, AnswerData],
    precision: str,
    deepspeed: dict | None,
) -> None:
    """Check that all ranks and all starts of a run have the same data and model, and write run.json and split.json.

    Raises:
        Refused: a rank has other data or another model; the run was started on other ones.
    """
    accelerator = run.accelerator
    identity = {
        "model_files": model_identity(args.model, args.revision),
        "data": {name: source["sha256"] for name, source in splits.record["sources"].items()},
        "splits": splits.record["splits"],
        "precision": precision,
        "deepspeed": None if deepspeed is None else deepspeed["zero_optimization"],
    }
    if len({json_sha256(each) for each in on_all_ranks(accelerator, identity)}) > 1:
        raise Refused("the ranks have different data or models: put files on a disk that all nodes share")
    path = run.path / "run.json"
    earlier = (read_json(path).get("identity") if held_results(run.path) else None) or identity
    changed = [name for name, value in identity.items() if json_sha256(earlier.get(name)) != json_sha256(value)]
    if changed:
        raise Refused(
            f"{run.path} was started on something else ({', '.join(changed)} changed since): restore that, or use "
            "another --output-dir"
        )
    accelerator.wait_for_everyone()  # all have read before rank 0 writes
    run.describe(args, splits.record, identity=identity)
    run.start_tracker(args.tracker)
    for name, part in data.items():
        limit = f"to {args.max_length} tokens" if args.max_length else "to fit"
        cut = f", {part.num_truncated:,} cut {limit}" if part.num_truncated else ""
        say(f"{name}: {len(part.ids):,} rows, {part.num_tokens(np.arange(len(part.ids))):,} tokens{cut}")


def build_engine(
    run: RunFolder,
    args,
    settings: ModelSettings,
    config,
    tokenizer,
    labels: tuple[str, ...],
    train: LabelledData | AnswerData | SpanData,
) -> Engine:
    """Load the model with its head, count its parameters, and put the optimizer around them.

    Of an embedding that trains, only the rows that the train split uses do; not under ZeRO-3, which shards it. A
    generator's may be tied to its LM head, which trains every row.
    """
    model = load_and_count(run, args.head, settings, config, tokenizer, labels)
    if settings.zero_stage != 3 and args.head != "generate":
        train_used_rows(model.stock_model, np.union1d(train.token_ids, [train.pad_id]))
    optimizer = optimizer_for(model, args, run.accelerator.device)
    return Engine(run.accelerator, model, optimizer, settings.precision, args.max_grad_norm)


def load_and_count(
    run: RunFolder, head: str, settings: ModelSettings, config, tokenizer, labels: tuple[str, ...]
) -> TunedModel:
    """Load the model with its head onto the device, and count its parameters in parameters.json."""
    if head == "classify":
        model = load_classifier(settings, labels, tokenizer)
    else:
        model = (load_span_model if head == "span" else load_generator)(settings, tokenizer)
    before, after = published_table(config), parameter_table(model)
    run.write_json("parameters.json", {"before": before, "after": after})
    say(format_table(before, after))
    return model if settings.method == "qlora" else model.to(run.accelerator.device)


def optimizer_for(model: TunedModel, args, device: torch.device) -> torch.optim.Optimizer:
    """--optimizer over the parameters that train, with the learning rates and the weight decay of the flags."""
    groups = parameter_groups(model, args.learning_rate, args.head_learning_rate, args.weight_decay)
    return build_optimizer(args.optimizer, groups, device.type)


def choosing_evaluation(
    engine: Engine,
    data: LabelledData | AnswerData | SpanData,
    schedule: Schedule,
    args,
    values: Callable[..., dict[str, float]],
    on_batch: Callable[[], None] = lambda: None,
):
    """(step) -> values of the choosing split with the weights as they are after it; all ranks take part.

    Args:
        values: (data, what `data.scores` gave for all examples, --choose-by) -> eval_* values and "choose_by".
        on_batch: called after each batch, on each rank; what it raises ends the evaluation.
    """
    batches = evaluation_batches(data.scored_lengths, args.tokens_per_device)

    def score(rows: np.ndarray) -> list[dict]:
        return data.scores(engine.forward, rows, engine.accelerator.device)

    def evaluate(step: int) -> dict[str, float]:
        engine.model.eval()
        decay_unused_rows(engine, schedule, args, step)
        return values(data, score_items(score, batches, engine.accelerator, on_batch=on_batch), args.choose_by)

    return evaluate


def choosing_values(data: LabelledData | AnswerData, records: list[dict], choose_by: str) -> dict[str, float]:
    """eval_loss, eval_accuracy, eval_f1_macro of the choosing split, and "choose_by", where greater is better.

    Args:
        records: of all examples, as `data.scores` gives them.
    """
    predictions = data.log_probabilities(records).argmax(axis=1)
    scores = confusion_scores(confusion_matrix(data.labels, predictions))
    values = {"loss": data.mean_loss(records)} | {name: float(scores[name]) for name in ("accuracy", "f1_macro")}
    better = -values[choose_by] if choose_by == "loss" else values[choose_by]
    return {f"eval_{name}": value for name, value in values.items()} | {"choose_by": better}


def decay_unused_rows(engine: Engine, schedule: Schedule, args, step: int) -> None:
    """Give the rows that are not trained what AdamW's weight decay has left of them after a step."""
    embedding = engine.module.stock_model.get_input_embeddings()
    if isinstance(embedding, UsedRowsEmbedding):
        factors = [schedule.rate_factor(earlier) for earlier in range(1, step + 1)]
        embedding.unused_decay = unused_decay(factors, args.learning_rate, args.weight_decay)


def resume(loop: Loop, args) -> None:
    """Go on from the checkpoint that --resume means, or start at step 0; rank 0 chooses for all.

    Raises:
        Refused: a checkpoint that was asked for by path is of another run or not whole; adamw8bit's state under
            DeepSpeed is of another number of processes.
    """
    folder, lines, problem = from_rank_0(loop.accelerator, lambda: _choose_checkpoint(loop, args))
    for line in lines:
        say(line)
    if problem:
        raise Refused(problem)
    if folder is None:
        loop.run.forget_metrics_after(0)
        return
    if args.resume != "auto" and is_main_process():
        checkpoints.unmark_later(folder)  # what the run did not go on from: killed now, it comes back to here
    loop.accelerator.wait_for_everyone()
    loop.resume(folder)
    saved_by, now = checkpoints.read_progress(folder)["num_processes"], loop.accelerator.num_processes
    moved = f" (saved by {saved_by} processes, now {now})" if saved_by != now else ""
    say(f"goes on after step {loop.progress.step} from {folder}{moved}")


def _choose_checkpoint(loop: Loop, args) -> tuple[Path | None, list[str], str | None]:
    """The checkpoint to go on from, lines to print, and what forbids it."""
    root = loop.checkpoint_root
    checkpoints.put_back_replaced(root)
    if args.resume in ("auto", "never"):
        folder, lines = checkpoints.newest_whole(root)
    else:
        folder, lines = Path(args.resume), []
        if folder.resolve().parent != root.resolve():
            return None, [], f"--resume {folder} is no checkpoint of this run: name one in {root}, or use --resume auto"
        problem = checkpoints.defect(folder)
        if problem:
            return None, [], f"--resume {folder}: {problem}: name a whole checkpoint, or use --resume auto"
    if folder is not None and loop.engine.deepspeed and args.optimizer == "adamw8bit":
        saved_by, now = checkpoints.read_progress(folder)["num_processes"], loop.accelerator.num_processes
        if saved_by != now:
            problem = (
                f"{folder} was saved by {saved_by} processes and this run has {now}: under DeepSpeed, adamw8bit has "
                f"its state in blocks of one process, which cannot move; launch {saved_by}"
            )
            return None, lines, problem
    return folder, lines, None


def save_best(loop: Loop, args, tokenizer, record: dict) -> Path:
    """Write final/ from the best checkpoint: aside, then renamed. All ranks take part.

    Args:
        record: what task.json says of the task: task, head, prompt, labels, thresholds, how texts are cut.
    Raises:
        Refused: the best checkpoint is not whole.
    """
    engine, progress, final = loop.engine, loop.progress, loop.run.path / "final"
    if progress.best_step != progress.step:
        best = checkpoints.step_folder(loop.checkpoint_root, progress.best_step)
        problem = from_rank_0(loop.accelerator, lambda: checkpoints.defect(best))
        if problem:
            raise Refused(
                f"the best checkpoint {best} is damaged ({problem}) and final/ is to be made of it: restore it, or "
                f"delete {loop.checkpoint_root} and start the same command again"
            )
        engine.load(best, weights_alone=True)
    decay_unused_rows(engine, loop.schedule, args, progress.best_step)
    restore_whole_embedding(engine.module.stock_model)
    state = engine.gathered_state_dict()
    if state is not None:  # names as in the module, wanted as in the model inside it
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if is_main_process():
        aside = final.with_name(".writing-final")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        record = record | {
            "seed": args.seed,
            "best_step": progress.best_step,
            "choose_by": args.choose_by,
            "engine": loop.NAME,
            "training_sha256": training_sha256(loop, args),
        }
        save_final(engine.module, tokenizer, aside, record, state)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    loop.accelerator.wait_for_everyone()
    return final


def logged_at(run: RunFolder, step: int) -> dict:
    """The evaluation that metrics.jsonl holds for a step; on rank 0, {} elsewhere."""
    if not is_main_process():
        return {}
    rows = read_json_lines(run.metrics_path)
    found = [row for row in rows if row["step"] == step and "eval_loss" in row]
    if not found:
        raise Refused(f"{run.metrics_path} holds no evaluation of step {step}, the best one: restore the file")
    return found[-1]


def free_training_memory(accelerator) -> None:
    """Let go of the model and optimizer that the accelerator holds, once nobody else does."""
    from accelerate.utils import release_memory

    accelerator.free_memory()  # empties the device's cache before it lets go of them
    release_memory()


def training_sha256(loop: Loop, args) -> str:
    """The same for runs that differ in their training seed alone."""
    flags = {name: value for name, value in recorded_flags(args).items() if name not in (*FREE_FLAGS, "seed")}
    return json_sha256([flags, loop.data.ids])
