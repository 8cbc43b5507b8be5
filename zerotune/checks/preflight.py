"""Before anything is loaded or written: flags filled in, model folder and data read, what cannot work refused."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from zerotune.errors import Refused
from zerotune.evaluation.scorers import labelled_data
from zerotune.files import read_json
from zerotune.models.attention import attention_kernel
from zerotune.models.final_folder import read_record
from zerotune.models.loading import ModelSettings, check_settings
from zerotune.models.lora import adapter_size
from zerotune.models.parameters import classifier_size, published_table
from zerotune.models.pretrained import check_labels, check_token_ids, check_weight_files, load_tokenizer, read_config
from zerotune.models.span_head import span_size
from zerotune.run.cpu import tokens_per_device
from zerotune.run.plan import describe_memory, logit_bytes, memory_need, offloaded, why_not_fit
from zerotune.run.process import say
from zerotune.settings.names import default_run_folder, model_or_default, sample_model_folder
from zerotune.squad import questions as squad
from zerotune.squad import sample as squad_sample
from zerotune.squad.span_data import SpanData
from zerotune.tasks import sample as samples
from zerotune.tasks import sst2
from zerotune.tasks.prompts import Prompt, uses_chat
from zerotune.tasks.split_settings import SETTING_NAMES
from zerotune.tasks.splits import Splits
from zerotune.training.classification import LabelledData
from zerotune.training.generation import AnswerData, encode_answers
from zerotune.training.schedule import schedule_for

FULL_RATE, ADAPTER_RATE, HEAD_RATE_FACTOR = 2e-5, 2e-4, 5


def settle_flags(args, task_name: str, sample_defaults: dict) -> None:
    """Fill in the flags that were not given, in place."""
    if args.sample and args.model is None:
        for name, value in sample_defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    args.model = model_or_default(args.model, args.sample, task_name)
    args.epochs = args.epochs or 3
    if args.learning_rate is None:
        args.learning_rate = FULL_RATE if args.method == "full" else ADAPTER_RATE
    if args.head_learning_rate is None and args.head != "generate":
        args.head_learning_rate = HEAD_RATE_FACTOR * args.learning_rate
    args.tokens_per_device = tokens_per_device(args.tokens_per_device, on_gpu=8192)
    if args.output_dir is None:
        args.output_dir = default_run_folder(task_name, args.model, args.method, args.head)


# What the tokenizers of the tiny models are trained on, by task; IMDB's model is SST-2's.
SAMPLE_TEXTS = {sst2.TASK: samples.review_lines, squad.TASK: squad_sample.sample_lines}


def read_model_folder(args, task_name: str, labels: tuple[str, ...] = ()) -> tuple:
    """Configuration and tokenizer of --model, before any weight is loaded; of a classifier for these labels.

    Raises Refused as their readers do, and for a model that was tuned for another kind of task."""
    if args.revision and os.path.isdir(args.model):
        raise Refused(
            f"--revision {args.revision} chooses a version of a hub model and {args.model} is a folder: drop it"
        )
    for of_task, lines in SAMPLE_TEXTS.items():
        if Path(args.model) == sample_model_folder(of_task):
            samples.tiny_causal_model(sample_model_folder(of_task), lines=lines)
    config = read_config(args.model, args.revision)
    check_tuned_for(args.model, args.revision, task_name)
    if labels:
        check_labels(config, labels)
    check_weight_files(args.model)
    return config, load_tokenizer(args.model, args.revision)


def check_tuned_for(model: str, revision: str | None, task_name: str) -> None:
    """Refuse a tuned model that answers questions where labels are wanted, or the other way round."""
    record = read_record(model, revision)
    if record is None or (record["task"] == squad.TASK) == (task_name == squad.TASK):
        return
    script = "qa" if record["task"] == squad.TASK else record["task"]
    raise Refused(
        f"{model} was tuned for {record['task']}, and this is {task_name}: evaluate it with eval/{script}.py, and "
        "train from the model that it was made of"
    )


def split_of_run(model: str, task_name: str) -> dict | None:
    """split.json of the run whose final/ this is, None where it is of another task or of no run."""
    path = Path(model).resolve().parent / "split.json"
    if not (os.path.exists(Path(model) / "task.json") and path.exists()):
        return None
    record = read_split(path)
    return record if record.get("task") == task_name else None


def read_split(path: Path) -> dict:
    """The content of a run's split.json. Raises Refused where it is damaged."""
    record = read_json(path)
    missing = [name for name in ("splits", "sources", "settings") if not isinstance(record.get(name), dict)]
    missing = missing or sorted(SETTING_NAMES ^ record["settings"].keys())
    if missing:
        raise Refused(
            f"{path} is damaged or of another version of zerotune ({', '.join(missing)}): restore it, or give "
            "--test-file"
        )
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


def tokenise(args, config, tokenizer, task, splits: Splits) -> dict[str, LabelledData] | dict[str, AnswerData]:
    """The train and choosing splits as tokens for the run's head; a classifier's from the cache, where it has them.

    Args:
        task: a task module (zerotune.tasks.sst2): WORDINGS, of which the first is a generator's prompt.
    Raises:
        Refused: as encode_texts and encode_answers do.
    """
    parts = {name: getattr(splits, name) for name in ("train", "choose")}
    if args.head == "classify":
        return {
            name: labelled_data(tokenizer, examples, args.max_length, args.truncation)
            for name, examples in parts.items()
        }
    template, label_words = task.WORDINGS[0]
    prompt = Prompt(template, label_words, uses_chat(args.prompt_format, tokenizer, args.model))
    window = config.max_position_embeddings
    return {
        name: encode_answers(tokenizer, prompt, examples, args.max_length, window) for name, examples in parts.items()
    }


def check_plan(
    args,
    settings: ModelSettings,
    config,
    data: LabelledData | AnswerData | SpanData,
    num_labels: int,
    deepspeed: dict | None,
) -> None:
    """Refuse a run that will not fit its GPU; with --plan, say what the run would do.

    Args:
        data: the train split.
        num_labels: of a classifier.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_token_ids(args.model, config, data.token_ids)
    generates = args.head == "generate"
    if generates:
        total, head = published_table(config)["total"], 0
    else:
        total, head = span_size(config) if args.head == "span" else classifier_size(config, num_labels)
    adapter = 0 if settings.method == "full" else adapter_size(config, settings.lora_rank)
    trainable = total if settings.method == "full" else adapter + head
    scored_tokens = int(data.lengths.max()) if attention_kernel(args.attention, config) == "eager" else 0
    world = (world_size, offloaded(deepspeed))
    need = memory_need(total + adapter, trainable, config, settings, args, world, scored_tokens)
    if generates:
        logits = logit_bytes(config, settings, args, data.answer_share)
        need = replace(need, activations=need.activations + logits)
    if torch.cuda.is_available():
        device_bytes = torch.cuda.mem_get_info()[1]
        # a generator is evaluated in the run's precision, heads on float32 weights
        precision = settings.precision if generates else "fp32"
        final_bytes = total * (4 if precision == "fp32" else 2)
        if settings.method == "full" and final_bytes > device_bytes:
            raise Refused(
                f"--method full ends by evaluating final/, whose {precision} weights take {final_bytes / 2**30:.0f} "
                f"GiB, and a device has {device_bytes / 2**30:.0f} GiB: use --method lora or qlora"
            )
        problem = why_not_fit(need, device_bytes, settings.method)
        if problem:
            raise Refused(problem)
    if not args.plan:
        return
    steps = data.epoch_steps(args.batch_size, args.seed, epoch=0)
    cuts = [data.micro_batches(step, args.tokens_per_device, world_size) for step in steps]
    micro = [batch for ranks in cuts for rank in ranks for batch in rank if len(batch)]
    num_passes = sum(len(ranks[0]) for ranks in cuts)
    num_tokens, num_padded = sum(map(data.num_tokens, micro)), sum(map(data.num_padded_tokens, micro))
    schedule = schedule_for(args, len(data.ids))
    say(f"model: {total + adapter:,} weights, {trainable:,} of them trained ({args.method}, {settings.precision})")
    say(f"data: {len(data.ids):,} rows, {num_tokens:,} tokens, {num_padded / num_tokens:.3f} × with padding")
    say(
        f"steps: {schedule.num_steps:,} of {args.batch_size} rows on {world_size} device(s), "
        f"{schedule.steps_per_epoch:,} an epoch, {num_passes / len(steps):.2f} micro-batches a step"
    )
    say(describe_memory(need))
