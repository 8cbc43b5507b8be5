"""A run on SQuAD v2, from its flags to its report: the stages in their order, as text_classification has them."""

import time
from dataclasses import asdict
from pathlib import Path

from zerotune import cpu, launch, preflight, results, run_checks, training
from zerotune.evaluation_options import QuestionOptions
from zerotune.final_folder import read_record
from zerotune.heads import is_encoder
from zerotune.loop import Loop
from zerotune.models import attention_kernel
from zerotune.precision import resolve_precision
from zerotune.pretrained import check_token_ids
from zerotune.runs import (
    RunFolder,
    check_earlier_run,
    describe_process,
    is_main_process,
    recorded_flags,
    say,
    short_name,
    started_at,
)
from zerotune.splits import Splits
from zerotune.squad import TASK
from zerotune.squad_evaluation import (
    choosing_values,
    evaluate_questions,
    is_trained_span_finder,
    span_data,
    span_settings,
)
from zerotune.squad_report import print_results, write_report
from zerotune.squad_results import print_scores, score_line
from zerotune.squad_splits import SOURCES, first_paragraphs, load_splits
from zerotune.stopping import StopSignal
from zerotune.task_sources import load_test, reporting_sha256

# Of training on --sample with its tiny model; a flag that is given wins.
SAMPLE_DEFAULTS = {"epochs": 8, "learning_rate": 3e-3}


def train(args) -> None:
    """Fine-tune a model to find answers, and report it against itself before training."""
    stop_signal = StopSignal()
    preflight.settle_flags(args, TASK, SAMPLE_DEFAULTS)
    if check_earlier_run(args.output_dir, args):
        return
    run_checks.check_run_flags(args)

    # data and configuration: all that can be refused is refused here, before a weight is loaded or a file written
    cpu.use_whole_cpu(tiny_model=args.sample)
    splits = load_splits(args)
    config, tokenizer = preflight.read_model_folder(args, labels=())
    for name, value in asdict(span_settings(args, config)).items():
        setattr(args, name, value)
    run_checks.check_model_flags(args, config)
    deepspeed = launch.read_deepspeed_config(args.deepspeed)
    precision = resolve_precision(args.precision, deepspeed)
    settings = preflight.model_settings(args, precision, launch.zero_stage(deepspeed))
    data = None
    if is_main_process():  # the other ranks wait at the process group, then find the cache of tokens filled
        data = _tokenise(args, config, tokenizer, splits)
        check_token_ids(args.model, config, data["train"].token_ids)
        preflight.check_plan(args, settings, config, data["train"], 0, deepspeed)
    if args.plan:
        return
    filled = None if deepspeed is None else launch.fill_deepspeed_config(deepspeed, args, precision)
    accelerator = launch.start_accelerator(filled)

    with RunFolder(args.output_dir, accelerator) as run:
        data = data or _tokenise(args, config, tokenizer, splits)
        training.start_run(run, args, splits, data, precision, filled)
        if data["train"].features.num_lost:
            say(f"train: {data['train'].features.num_lost:,} answers stand whole in no window and do not teach")
        base_eval_s = _evaluate_base(run, args, config, precision, splits, stop_signal)

        engine = training.build_engine(run, args, settings, config, tokenizer, (), data["train"])
        schedule = preflight.schedule_for(args, len(splits.train))
        choose = training.choosing_evaluation(engine, data["choose"], schedule, args, choosing_values)
        loop = Loop(engine, data["train"], schedule, run, args, choose, stop_signal)
        training.resume(loop, args)
        startup_s = time.time() - started_at() - base_eval_s
        progress = loop.train()

        record = _task_record(args, training.logged_at(run, progress.best_step))
        final = training.save_best(loop, args, tokenizer, record)
        del engine, loop, choose
        training.free_training_memory(accelerator)
        _evaluate_final(run, args, final, precision, splits, stop_signal)
        print_results(run.path)
        report = {question.id: question for question in splits.test}
        results.finish(run, args, progress, lambda path: write_report(path, report), startup_s, base_eval_s)


def _tokenise(args, config, tokenizer, splits: Splits) -> dict:
    settings = span_settings(args, config)
    return {name: span_data(tokenizer, getattr(splits, name), settings, config) for name in ("train", "choose")}


def _task_record(args, evaluated: dict) -> dict:
    """What task.json says of the task; `evaluated` is the best evaluation's line of metrics.jsonl."""
    return {
        "task": TASK,
        "head": args.head,
        "prompt": None,
        "labels": None,
        "max_length": args.max_length,
        "doc_stride": args.doc_stride,
        "max_answer_length": args.max_answer_length,
        "n_best": args.n_best,
        "thresholds": {"null_odds": evaluated.get("eval_threshold")},
    }


def _evaluate_base(run: RunFolder, args, config, precision: str, splits: Splits, stop_signal) -> float:
    """Evaluate the model as it is before training into eval/base, with a head that is untrained. Returns the seconds.

    A causal model has no span head at all before training."""
    started = time.perf_counter()
    if args.base_eval == "none":
        return 0.0
    if not (is_encoder(config) or is_trained_span_finder(config)):
        say(
            "no base evaluation: a causal model has no span head before training; leaving all unanswered stands instead"
        )
        return 0.0
    questions = splits.test
    if args.base_eval == "subset":
        questions = first_paragraphs(questions, results.BASE_EVAL_ITEMS, args.split_seed, "base evaluation")
    options = QuestionOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=precision,
        tokens_per_device=args.tokens_per_device,
        load_4bit=args.method == "qlora",
        max_length=args.max_length,
        doc_stride=args.doc_stride,
        max_answer_length=args.max_answer_length,
        n_best=args.n_best,
        seed=args.seed,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "base"
    metrics = evaluate_questions(folder, options, questions, run.accelerator, stop_signal, replace=True)
    if is_main_process():
        say(f"base ({metrics['setting']}): {score_line(metrics)}")
    return time.perf_counter() - started


def _evaluate_final(run: RunFolder, args, final: Path, precision: str, splits: Splits, stop_signal) -> None:
    """Evaluate the reloaded final/ on all test questions into eval/final."""
    options = QuestionOptions(
        model=str(final),
        revision=None,
        attention=args.attention,
        precision=precision,
        tokens_per_device=args.tokens_per_device,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "final"
    evaluate_questions(folder, options, splits.test, run.accelerator, stop_signal, replace=True)


def evaluate(args) -> None:
    """Evaluate a model with a span head: a final/ folder, or a published one."""
    args.model = args.model or (str(preflight.sample_model_folder(TASK)) if args.sample else preflight.DEFAULT_MODEL)
    args.output_dir = args.output_dir or Path("runs") / f"eval-{TASK}-{short_name(args.model)}"
    stop_signal = StopSignal()
    check_earlier_run(args.output_dir, args, says_finished=False)
    cpu.use_whole_cpu(tiny_model=args.sample)
    config, _ = preflight.read_model_folder(args, labels=())
    attention_kernel(args.attention, config)
    span_settings(args, config, read_record(args.model, args.revision))
    questions, record = load_test(SOURCES, args, preflight.split_of_run(args.model))
    options = QuestionOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=resolve_precision(args.precision, None),
        tokens_per_device=cpu.tokens_per_device(args.tokens_per_device, on_gpu=16384),
        load_4bit=args.load_4bit,
        max_length=args.max_length,
        doc_stride=args.doc_stride,
        max_answer_length=args.max_answer_length,
        n_best=args.n_best,
        seed=args.seed,
        data_sha256=reporting_sha256(record),
    )
    accelerator = launch.start_accelerator(None)

    with RunFolder(args.output_dir, accelerator) as run:
        run.write_json("split.json", record)
        world = {"num_processes": accelerator.num_processes, "device": training.device_name(accelerator.device)}
        run.write_json("run.json", {**describe_process(), "flags": recorded_flags(args), "world": world})
        metrics = evaluate_questions(run.path, options, questions, accelerator, stop_signal)
        if is_main_process():
            print_scores(metrics)
            say(f"results in {run.path}")
        run.write_json("state.json", {"state": "finished", "reason": None})
