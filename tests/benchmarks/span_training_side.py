"""One training of span_training.py, in a process of its own: its settings are the JSON object that is its argument."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

MAX_LENGTH, DOC_STRIDE, NUM_BEST, MAX_ANSWER_LENGTH = 384, 128, 20, 30
WARMUP_RATIO, WEIGHT_DECAY = 0.1, 0.01


def train(args) -> None:
    """Train one way and write its figures to args.result, with scores where it is trained whole."""
    from zerotune.run import cpu

    if args.way == "ours":
        cpu.use_whole_cpu(tiny_model=False)
    import numpy as np
    import torch

    from zerotune.models.pretrained import load_tokenizer
    from zerotune.randomness import random_order
    from zerotune.squad.files import read_questions
    from zerotune.squad.span_data import SpanData
    from zerotune.squad.windows import cut_windows

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model, None)
    data = {}
    for name, path, count in (
        ("train", args.train_file, args.questions),
        ("eval", args.test_file, args.eval_questions),
    ):
        questions, _ = read_questions(Path(path))
        chosen = [questions[place] for place in np.sort(random_order(len(questions), 0, name)[:count])]
        features = cut_windows(tokenizer, chosen, False, MAX_LENGTH, DOC_STRIDE, None)
        data[name] = SpanData(chosen, features, tokenizer.pad_token_id, NUM_BEST, MAX_ANSWER_LENGTH)
    torch.manual_seed(args.seed)
    model, figures = (train_ours if args.way == "ours" else train_with_trainer)(args, data["train"], tokenizer)
    scores = dict.fromkeys(("exact", "f1", "HasAns_f1", "NoAns_f1"))
    if args.max_steps is None:
        found = official_scores_of(model, data["eval"])
        scores = {name: found[name] for name in scores}
    Path(args.result).write_text(json.dumps(figures | scores))


def train_ours(args, data, tokenizer):
    """zerotune's loop, bf16 where the processor has it, as train/qa.py builds it."""
    import numpy as np
    from zerotune.training.stages import optimizer_for

    from zerotune.models.span_head import load_span_model
    from zerotune.models.used_rows import train_used_rows
    from zerotune.run.cpu import CPU_TOKENS
    from zerotune.run.folder import RunFolder
    from zerotune.run.launch import start_accelerator
    from zerotune.settings.groups import ModelSettings
    from zerotune.settings.precision import default_precision
    from zerotune.training.batches import num_steps_per_epoch
    from zerotune.training.engine import Engine
    from zerotune.training.loop import Loop
    from zerotune.training.schedule import plan_schedule

    flags = {"learning_rate": args.learning_rate, "head_learning_rate": args.learning_rate, "optimizer": "adamw"}
    flags |= {"weight_decay": WEIGHT_DECAY, "batch_size": args.batch_size, "tokens_per_device": CPU_TOKENS, "epochs": 1}
    flags |= {"warmup_ratio": WARMUP_RATIO, "max_steps": args.max_steps, "seed": args.seed, "patience": None}
    flags |= {
        "eval_every": None,
        "checkpoint_every": 10**6,
        "log_every": 10,
        "keep_checkpoints": 1,
        "scratch_dir": None,
    }
    own = SimpleNamespace(**flags)
    accelerator = start_accelerator(None)
    settings = ModelSettings(args.model, None, "full", precision=default_precision(), seed=args.seed)
    model = load_span_model(settings, tokenizer)
    train_used_rows(model.stock_model, np.union1d(data.token_ids, [data.pad_id]))
    engine = Engine(accelerator, model, optimizer_for(model, own, accelerator.device), settings.precision, 1.0)
    schedule = plan_schedule(own, num_steps_per_epoch(len(data.ids), args.batch_size))
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run", accelerator) as run:
        no_values = {"eval_loss": 0.0, "choose_by": 0.0}
        stop_signal = SimpleNamespace(name=None)
        progress = Loop(engine, data, schedule, run, own, lambda step: dict(no_values), stop_signal).train()
    seconds = progress.train_seconds
    return model, {"questions_per_s": progress.num_examples / seconds, "train_s": seconds}


def train_with_trainer(args, data, tokenizer):
    """The Trainer over the same windows, which it shuffles and counts one by one."""
    import torch
    from trainer_side import Timing, training_arguments
    from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer, default_data_collator

    from zerotune.models.heads import make_head_float32
    from zerotune.models.span_head import SpanModel

    pads = args.way == "default"
    rows = _as_rows(data, tokenizer, pads)
    model = AutoModelForQuestionAnswering.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attention or "sdpa"
    )
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(args, folder, WEIGHT_DECAY, WARMUP_RATIO),
            train_dataset=rows,
            data_collator=default_data_collator if pads else DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[timing],
        )
        trainer.train()
    seconds = timing.ended - timing.started
    num_windows = min(trainer.state.global_step * args.batch_size, len(rows))
    num_questions = num_windows * len(data.ids) / len(rows)
    make_head_float32(model)  # so that all ways are evaluated alike
    return SpanModel(model), {"questions_per_s": num_questions / seconds, "train_s": seconds}


def _as_rows(data, tokenizer, pads: bool) -> list[dict]:
    """Windows as the Trainer takes them; run_qa.py pads each to the maximum length beforehand."""
    import numpy as np

    rows = []
    for window, labels in enumerate(data.features.labels):
        inputs = data.features.inputs(np.array([window]), data.pad_id)
        row = {name: values[0].tolist() for name, values in inputs.items()}
        row = dict(tokenizer.pad(row, padding="max_length", max_length=MAX_LENGTH)) if pads else row
        rows.append(row | {"start_positions": int(labels[0]), "end_positions": int(labels[1])})
    return rows


def official_scores_of(model, data) -> dict:
    """Official scores where the best span is given unless the null score is higher."""
    import torch

    from zerotune.models.precision import autocast
    from zerotune.settings.precision import default_precision
    from zerotune.squad.metrics import official_scores, score_answers
    from zerotune.training.batches import evaluation_batches

    model.eval()
    found = {}
    with torch.no_grad(), autocast("cpu", default_precision()):
        for rows in evaluation_batches(data.scored_lengths, 4096):
            found |= dict(zip(rows.tolist(), data.scores(model, rows, torch.device("cpu")), strict=True))
    records = [found[row] for row in range(len(data.ids))]
    answers = zip(data.ids, data.answers(records), data.null_odds(records), strict=True)
    texts = {name: spans[0].text if spans and odds <= 0 else "" for name, spans, odds in answers}
    return official_scores(score_answers(data.questions, texts))


if __name__ == "__main__":
    train(SimpleNamespace(**json.loads(sys.argv[1])))
