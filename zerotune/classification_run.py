"""The stages of a classification training run, in the order in which train/sst2.py goes through them."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from zerotune import checkpoints
from zerotune.adapters import adapter_size
from zerotune.arguments import DEFAULT_MODEL
from zerotune.batching import epoch_steps, evaluation_batches, micro_batches, num_steps_per_epoch, padding_ratio
from zerotune.classification import (
    choosing_values,
    classifier_scorer,
    labelled_data,
)
from zerotune.cpu import tokens_per_device
from zerotune.data import LabelledData
from zerotune.embedding import UsedRowsEmbedding, restore_whole_embedding, train_used_rows, unused_decay
from zerotune.encoding import default_cache_dir
from zerotune.engine import Engine, build_optimizer
from zerotune.errors import Refused
from zerotune.files import json_sha256, read_json
from zerotune.final_folder import save_final
from zerotune.launch import on_all_ranks
from zerotune.loop import Loop
from zerotune.model_files import model_identity
from zerotune.models import (
    ModelSettings,
    check_labels,
    check_settings,
    load_classifier,
    parameter_groups,
)
from zerotune.parameters import classifier_size, format_table, parameter_table, published_table
from zerotune.plan import describe_memory, memory_need, offloaded, why_not_fit
from zerotune.pretrained import check_token_ids, check_weight_files, load_tokenizer, read_config
from zerotune.runs import FREE_FLAGS, RunFolder, describe_process, is_main_process, recorded_flags, say, short_name
from zerotune.schedule import Schedule, plan_schedule
from zerotune.scoring import score_items
from zerotune.splits import Splits

FULL_RATE, ADAPTER_RATE, HEAD_RATE_FACTOR = 2e-5, 2e-4, 5


def settle_flags(args, task_name: str, sample_defaults: dict) -> None:
    """Fill in the flags that were not given, in place."""
    if args.sample and args.model is None:
        for name, value in sample_defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    args.model = args.model or (str(sample_model_folder()) if args.sample else DEFAULT_MODEL)
    args.epochs = args.epochs or 3
    if args.learning_rate is None:
        args.learning_rate = FULL_RATE if args.method == "full" else ADAPTER_RATE
    if args.head_learning_rate is None:
        args.head_learning_rate = HEAD_RATE_FACTOR * args.learning_rate
    args.tokens_per_device = tokens_per_device(args.tokens_per_device, on_gpu=8192)
    if args.output_dir is None:
        args.output_dir = Path("runs") / f"{task_name}-{short_name(args.model)}-{args.method}"


def sample_model_folder() -> Path:
    """Where --sample keeps its tiny model, for train and eval alike."""
    return default_cache_dir() / "sample-llama"


def read_model_folder(args, labels: tuple[str, ...]) -> tuple:
    """Configuration and tokenizer of --model, before any weight is loaded. Raises Refused as their readers do."""
    if args.revision and os.path.isdir(args.model):
        raise Refused(
            f"--revision {args.revision} chooses a version of a hub model and {args.model} is a folder: drop it"
        )
    if Path(args.model) == sample_model_folder():
        from zerotune.samples import tiny_causal_model

        tiny_causal_model(sample_model_folder())
    config = read_config(args.model, args.revision)
    check_labels(config, labels)
    check_weight_files(args.model)
    return config, load_tokenizer(args.model, args.revision)


def split_of_run(model: str) -> dict | None:
    """split.json of the run whose final/ this is."""
    path = Path(model).resolve().parent / "split.json"
    return read_split(path) if os.path.exists(Path(model) / "task.json") and path.exists() else None


def read_split(path: Path) -> dict:
    """The content of a run's split.json. Raises Refused where it is damaged."""
    record = read_json(path)
    missing = [name for name in ("splits", "sources", "settings") if not isinstance(record.get(name), dict)]
    if missing:
        raise Refused(f"{path} is damaged (it lacks {', '.join(missing)}): restore it, or give --test-file")
    return record


def model_settings(args, precision: str, zero_stage: int | None) -> ModelSettings:
    """How the model is loaded. Raises Refused for what cannot be trained, before anything is."""
    settings = ModelSettings(
        name=args.model,
        revision=args.revision,
        method=args.method,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        attention=args.attention,
        precision=precision,
        activation_checkpointing=args.activation_checkpointing,
        zero_stage=zero_stage,
        seed=args.seed,
    )
    check_settings(settings)
    return settings


def tokenise(args, tokenizer, splits: Splits) -> dict[str, LabelledData]:
    """The train and choosing splits as tokens, from the cache when they have been tokenised before."""
    return {name: labelled_data(tokenizer, getattr(splits, name), args.max_length) for name in ("train", "choose")}


def start_run(
    run: RunFolder, args, splits: Splits, data: dict[str, LabelledData], precision: str, deepspeed: dict | None
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
    earlier = (read_json(path).get("identity") if path.exists() else None) or identity
    changed = [name for name, value in identity.items() if json_sha256(earlier.get(name)) != json_sha256(value)]
    if changed:
        raise Refused(
            f"{run.path} was started on something else ({', '.join(changed)} changed since): restore that, or use "
            "another --output-dir"
        )
    accelerator.wait_for_everyone()  # all have read before rank 0 writes
    run.write_json("split.json", splits.record)
    run.update_json(
        "run.json",
        **describe_process(),
        task=splits.record["task"],
        flags=recorded_flags(args),
        identity=identity,
        world={"num_processes": accelerator.num_processes, "device": device_name(accelerator.device)},
    )
    run.start_tracker(args.tracker)
    for note in splits.record["notes"]:
        say(f"data: {note}")
    for name, part in data.items():
        cut = f", {part.encoded.num_truncated:,} cut to {args.max_length} tokens" if part.encoded.num_truncated else ""
        say(f"{name}: {len(part.ids):,} rows, {int(part.lengths.sum()):,} tokens{cut}")


def check_plan(
    args, settings: ModelSettings, config, data: LabelledData, num_labels: int, deepspeed: dict | None
) -> None:
    """Refuse a run that will not fit its GPU; with --plan, say what the run would do.

    Args:
        data: the train split.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_token_ids(args.model, config, data.encoded.ids)
    total, head = classifier_size(config, num_labels)
    adapter = 0 if settings.method == "full" else adapter_size(config, settings.lora_rank)
    trainable = total if settings.method == "full" else adapter + head
    need = memory_need(total + adapter, trainable, config, settings, args, (world_size, offloaded(deepspeed)))
    if torch.cuda.is_available():
        device_bytes = torch.cuda.mem_get_info()[1]
        if settings.method == "full" and 4 * total > device_bytes:
            raise Refused(
                f"--method full ends by evaluating final/, whose float32 weights take {4 * total / 2**30:.0f} GiB, and "
                f"a device has {device_bytes / 2**30:.0f} GiB: use --method lora or qlora"
            )
        problem = why_not_fit(need, device_bytes, settings.method)
        if problem:
            raise Refused(problem)
    if not args.plan:
        return
    budget, lengths = args.tokens_per_device, data.lengths
    steps = epoch_steps(lengths, args.batch_size, args.seed, epoch=0)
    micro = [batch for step in steps for rank in micro_batches(step, lengths, budget, world_size) for batch in rank]
    schedule = schedule_for(args, len(data.ids))
    say(f"model: {total + adapter:,} weights, {trainable:,} of them trained ({args.method}, {settings.precision})")
    say(f"data: {len(lengths):,} rows, {lengths.sum():,} tokens, {padding_ratio(micro, lengths):.3f} × with padding")
    say(
        f"steps: {schedule.num_steps:,} of {args.batch_size} rows on {world_size} device(s), "
        f"{schedule.steps_per_epoch:,} an epoch, {len(micro) / len(steps) / world_size:.2f} micro-batches a step"
    )
    say(describe_memory(need))


def device_name(device: torch.device) -> str:
    """What kind of device this is, for run.json."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def build_engine(
    run: RunFolder, args, settings: ModelSettings, config, tokenizer, labels: tuple[str, ...], train: LabelledData
) -> Engine:
    """Load the model with its head, count its parameters, and put the optimizer around them.

    Of an embedding that is trained, only the rows that the train split uses are; not under ZeRO-3, which shards it.
    """
    classifier = load_classifier(settings, labels, tokenizer)
    before, after = published_table(config), parameter_table(classifier)
    run.write_json("parameters.json", {"before": before, "after": after})
    say(format_table(before, after))
    if settings.zero_stage != 3:
        train_used_rows(classifier.stock_model, np.union1d(train.encoded.ids, [train.pad_id]))
    groups = parameter_groups(classifier, args.learning_rate, args.head_learning_rate, args.weight_decay)
    accelerator = run.accelerator
    if settings.method != "qlora":
        classifier.to(accelerator.device)
    optimizer = build_optimizer(args.optimizer, groups, accelerator.device.type)
    return Engine(accelerator, classifier, optimizer, settings.precision, args.max_grad_norm)


def choosing_evaluation(engine: Engine, data: LabelledData, schedule: Schedule, args):
    """(step) -> values of the choosing split with the weights as they are after it; all ranks take part."""
    batches = evaluation_batches(data.lengths, args.tokens_per_device)

    def evaluate(step: int) -> dict[str, float]:
        engine.model.eval()
        decay_unused_rows(engine, schedule, args, step)
        score = classifier_scorer(engine.forward, data, engine.accelerator.device, "fp32")
        scores = score_items(score, batches, engine.accelerator)
        return choosing_values(data.labels, scores, args.choose_by)

    return evaluate


def decay_unused_rows(engine: Engine, schedule: Schedule, args, step: int) -> None:
    """Give the rows that are not trained what AdamW's weight decay has left of them after a step."""
    embedding = engine.module.stock_model.get_input_embeddings()
    if isinstance(embedding, UsedRowsEmbedding):
        factors = [schedule.rate_factor(earlier) for earlier in range(1, step + 1)]
        embedding.unused_decay = unused_decay(factors, args.learning_rate, args.weight_decay)


def schedule_for(args, num_examples: int):
    """The schedule that the flags ask for."""
    return plan_schedule(args, num_steps_per_epoch(num_examples, args.batch_size))


def resume(loop: Loop, args) -> None:
    """Go on from the checkpoint that --resume means, or start at step 0; rank 0 chooses for all.

    Raises:
        Refused: a checkpoint that was asked for by path is of another run or not whole; DeepSpeed's is of another
            number of processes.
    """
    choice = _choose_checkpoint(loop, args) if is_main_process() else None
    folder, lines, problem = on_all_ranks(loop.accelerator, choice)[0]
    for line in lines:
        say(line)
    if problem:
        raise Refused(problem)
    if folder is None:
        loop.run.forget_metrics_after(0)
        return
    loop.resume(folder)
    say(f"goes on after step {loop.progress.step} from {folder}")


def _choose_checkpoint(loop: Loop, args) -> tuple[Path | None, list[str], str | None]:
    """The checkpoint to go on from, lines to print, and what forbids it."""
    root = loop.checkpoint_root
    if args.resume in ("auto", "never"):
        folder, lines = checkpoints.newest_whole(root)
    else:
        folder, lines = Path(args.resume), []
        if folder.resolve().parent != root.resolve():
            return None, [], f"--resume {folder} is no checkpoint of this run: name one in {root}, or use --resume auto"
        problem = checkpoints.defect(folder)
        if problem:
            return None, [], f"--resume {folder}: {problem}: name a whole checkpoint, or use --resume auto"
    if folder is None:
        return None, lines, None
    saved_by, now = checkpoints.read_progress(folder)["num_processes"], loop.accelerator.num_processes
    if loop.engine.deepspeed and saved_by != now:
        problem = (
            f"{folder} was saved by {saved_by} processes under DeepSpeed and this run has {now}: launch {saved_by}"
        )
        return None, lines, problem
    return folder, lines, None


def save_best(loop: Loop, args, tokenizer, task) -> Path:
    """Write final/ from the best checkpoint: aside, then renamed. All ranks take part.

    Raises:
        Refused: the best checkpoint is not whole.
    """
    engine, progress, final = loop.engine, loop.progress, loop.run.path / "final"
    if progress.best_step != progress.step:
        best = checkpoints.step_folder(loop.checkpoint_root, progress.best_step)
        problem = checkpoints.defect(best)
        if problem:
            raise Refused(
                f"the best checkpoint {best} is damaged ({problem}) and final/ is to be made of it: restore it, or "
                f"delete {loop.checkpoint_root} and start the same command again"
            )
        engine.load(best)
    decay_unused_rows(engine, loop.schedule, args, progress.best_step)
    restore_whole_embedding(engine.module.stock_model)
    state = engine.gathered_state_dict()
    if state is not None:  # names as in the classifier, wanted as in the model inside it
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if is_main_process():
        aside = final.with_name(".writing-final")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        record = {
            "task": task.TASK,
            "head": "classify",
            "prompt": None,
            "labels": list(task.LABELS),
            "max_length": args.max_length,
            "thresholds": None,
            "seed": args.seed,
            "best_step": progress.best_step,
            "choose_by": args.choose_by,
            "training_sha256": training_sha256(loop, args),
        }
        save_final(engine.module, tokenizer, aside, record, state)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    loop.accelerator.wait_for_everyone()
    return final


def free_training_memory(accelerator) -> None:
    """Let go of the model and optimizer that the accelerator holds, once nobody else does."""
    from accelerate.utils import release_memory

    accelerator.free_memory()  # empties the device's cache before it lets go of them
    release_memory()


def training_sha256(loop: Loop, args) -> str:
    """The same for runs that differ in their training seed alone."""
    flags = {name: value for name, value in recorded_flags(args).items() if name not in (*FREE_FLAGS, "seed")}
    return json_sha256([flags, loop.data.ids])
