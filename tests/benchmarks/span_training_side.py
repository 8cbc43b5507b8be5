"""One training of span_training.py, in its own process. Its only argument is a JSON object of settings."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

MAX_LENGTH, DOC_STRIDE, NUM_BEST, MAX_ANSWER_LENGTH = 384, 128, 20, 30
WARMUP_RATIO, WEIGHT_DECAY = 0.1, 0.01


def train(args) -> None:
    """Train one way and write its figures to args.result, with scores if it trains a whole epoch."""
    from zerotune.run.launch import use_own_device

    if args.way == "ours":
        use_own_device(tiny_model=False)
    import numpy as np
    import torch

    from zerotune.models.pretrained import load_tokenizer
    from zerotune.randomness import random_order
    from zerotune.squad.files import read_questions
    from zerotune.squad.spans import SpanData
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
        windows = cut_windows(tokenizer, chosen, False, MAX_LENGTH, DOC_STRIDE, None)
        data[name] = SpanData(chosen, windows, tokenizer.pad_token_id, NUM_BEST, MAX_ANSWER_LENGTH)
    torch.manual_seed(args.seed)
    model, figures = (train_ours if args.way == "ours" else train_with_trainer)(args, data["train"], tokenizer)
    scores = dict.fromkeys(("exact", "f1", "HasAns_f1", "NoAns_f1"))
    if args.max_steps is None:
        found = official_scores_of(model, data["eval"])
        scores = {name: found[name] for name in scores}
    Path(args.result).write_text(json.dumps(figures | scores))


def train_ours(args, data, tokenizer):
    """Train with zerotune's loop as train/qa.py does, in bf16 if the processor supports it."""
    from zerotune.models.pretrained import read_config
    from zerotune.run.folder import RunFolder
    from zerotune.run.launch import start_accelerator
    from zerotune.settings.groups import (
        DataSettings,
        FlagRecord,
        Interval,
        ModelSettings,
        OptimisationSettings,
        RunSettings,
        TrainSettings,
    )
    from zerotune.settings.precision import default_precision
    from zerotune.settings.resolve import CPU_TOKENS
    from zerotune.squad.spans import window_losses
    from zerotune.training.engine import load_engine
    from zerotune.training.loop import TrainingLoop
    from zerotune.training.schedule import plan_schedule

    accelerator = start_accelerator(None)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            task="squad",
            head="span",
            model=ModelSettings(args.model, precision=default_precision(), seed=args.seed),
            data=DataSettings(),
            optimisation=OptimisationSettings(
                epochs=1,
                max_steps=args.max_steps,
                batch_size=args.batch_size,
                tokens_per_device=CPU_TOKENS,
                optimizer="adamw",
                learning_rate=args.learning_rate,
                head_learning_rate=args.learning_rate,
                warmup_ratio=WARMUP_RATIO,
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=1.0,
                patience=None,
                choose_by="loss",
                eval_every=None,
                seed=args.seed,
            ),
            run=RunSettings(
                Path(folder) / "run", FlagRecord({}), checkpoint_every=Interval(steps=10**6), keep_checkpoints=1
            ),
        )
        with RunFolder(settings.run, accelerator) as run:
            engine = load_engine(run, settings, read_config(args.model, None), tokenizer, (), data)
            schedule = plan_schedule(settings.optimisation, settings.run, len(data.ids))
            stop_signal = SimpleNamespace(name=None)
            loop = TrainingLoop(run, engine, data, schedule, settings.optimisation, lambda: {"loss": 0.0}, stop_signal)
            for step in loop:
                for batch in step:
                    logits = engine.forward(**batch.inputs)
                    losses = window_losses(logits, batch.inputs["attention_mask"], batch.targets)
                    engine.backward(losses.sum() * batch.weight, batch.is_last)
                engine.update(step.rate_factor)
    seconds = loop.progress.train_seconds
    return engine.module, {"questions_per_s": loop.progress.num_examples / seconds, "train_s": seconds}


def train_with_trainer(args, data, tokenizer):
    """Train with the Trainer over the same windows; it shuffles and counts windows, not questions."""
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
    make_head_float32(model)  # all ways are evaluated alike
    return SpanModel(model), {"questions_per_s": num_questions / seconds, "train_s": seconds}


def _as_rows(data, tokenizer, pads: bool) -> list[dict]:
    """Return windows in the Trainer's format; run_qa.py pads each to the maximum length beforehand."""
    import numpy as np

    rows = []
    for window, labels in enumerate(data.windows.labels):
        inputs = data.windows.inputs(np.array([window]), data.pad_id)
        row = {name: values[0].tolist() for name, values in inputs.items()}
        row = dict(tokenizer.pad(row, padding="max_length", max_length=MAX_LENGTH)) if pads else row
        rows.append(row | {"start_positions": int(labels[0]), "end_positions": int(labels[1])})
    return rows


def official_scores_of(model, data) -> dict:
    """Return the official scores when the answer is the best span unless the null score is higher."""
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
    answers = zip(data.ids, data.best_texts(records), data.null_odds(records), strict=True)
    texts = {name: "" if odds > 0 else text for name, text, odds in answers}
    return official_scores(score_answers(data.questions, texts))


if __name__ == "__main__":
    train(SimpleNamespace(**json.loads(sys.argv[1])))
