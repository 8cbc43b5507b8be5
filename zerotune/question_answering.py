"""A run on SQuAD v2, from its flags to its report: the stages in their order, as text_classification has them."""

import time
from dataclasses import replace

from zerotune.checks import preflight
from zerotune.checks.squad_flags import check_evaluation_flags, check_training_flags, training_lengths
from zerotune.evaluation import results
from zerotune.evaluation.folder import check_earlier
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.branches import can_share
from zerotune.models.loading import check_trainable
from zerotune.models.model_files import read_record
from zerotune.report.run_report import print_run_table, write_report
from zerotune.run import cpu, launch
from zerotune.run.folder import RunFolder, check_earlier_run
from zerotune.run.process import is_main_process, say, started_at
from zerotune.run.stopping import StopSignal
from zerotune.settings.deepspeed import fill_deepspeed_config, read_deepspeed_config, zero_stage
from zerotune.settings.groups import QuestionSettings
from zerotune.settings.names import default_eval_folder, model_or_default
from zerotune.settings.precision import resolve_precision
from zerotune.settings.resolve import data_settings
from zerotune.squad import question_evaluation
from zerotune.squad.evaluation import (
    answers_by_span,
    choosing_values,
    evaluate_questions,
    items_of,
    span_data,
)
from zerotune.squad.generation import GenerationData, encode_questions
from zerotune.squad.options import QuestionOptions
from zerotune.squad.prompts import QuestionPrompt, draw_solved_questions, question_prompt_record
from zerotune.squad.questions import TASK
from zerotune.squad.report import print_scores, question_parts, score_line
from zerotune.squad.span_data import SpanData
from zerotune.squad.splits import first_paragraphs, load, load_shots, load_test
from zerotune.tasks.prompts import uses_chat
from zerotune.tasks.sources import reporting_sha256, split_of_run
from zerotune.tasks.splits import Splits
from zerotune.training import stages
from zerotune.training.loop import Loop
from zerotune.training.schedule import schedule_for

# Of training on --sample with its tiny model, by head; a flag that is given wins.
SAMPLE_DEFAULTS = {
    "span": {"epochs": 8, "learning_rate": 3e-3},
    "generate": {"epochs": 16, "learning_rate": 3e-3},
}


def train(args) -> None:
    """Fine-tune a model to find answers or to write them, and report it against itself before training."""
    stop_signal = StopSignal()
    preflight.settle_flags(args, TASK, SAMPLE_DEFAULTS[args.head])
    if check_earlier_run(args.output_dir, args):
        return
    run_checks.check_run_flags(args)

    # data and configuration: all that can be refused is refused here, before a weight is loaded or a file written
    cpu.use_whole_cpu(tiny_model=args.sample)
    splits = load(data_settings(args))
    config, tokenizer = preflight.read_model_folder(args, TASK)
    check_training_flags(args, config, tokenizer)
    lengths = training_lengths(args, config)
    deepspeed = read_deepspeed_config(args.deepspeed)
    precision = resolve_precision(args.precision, deepspeed)
    settings = preflight.model_settings(args, precision, zero_stage(deepspeed))
    check_trainable(settings, config, args.max_length)
    data = None
    if is_main_process():  # the other ranks wait at the process group, then find the cache of tokens filled
        data = _tokenise(args, config, tokenizer, splits, lengths)
        preflight.check_plan(args, settings, config, data["train"], 0, deepspeed)
    if args.plan:
        return
    filled = (
        None if deepspeed is None else fill_deepspeed_config(deepspeed, args.batch_size, args.max_grad_norm, precision)
    )
    accelerator = launch.start_accelerator(filled)

    with RunFolder(args.output_dir, accelerator, args) as run:
        data = data or _tokenise(args, config, tokenizer, splits, lengths)
        stop_signal.raise_when_noted(accelerator, "preparation")
        stages.start_run(run, args, splits, data, precision, filled)
        base_eval_s = _evaluate_base(run, args, config, precision, splits, stop_signal)

        engine = stages.build_engine(run, args, settings, config, tokenizer, (), data["train"])
        schedule = schedule_for(args, len(splits.train))

        def heed() -> None:
            stop_signal.raise_when_noted(accelerator)

        if args.head == "span":
            choose = stages.choosing_evaluation(engine, data["validation"], schedule, args, choosing_values, heed)
        else:
            choose = question_evaluation.choosing_evaluation(
                engine, data["validation"], splits.validation, tokenizer, args, lengths["max_new_tokens"], heed
            )
        loop = Loop(engine, data["train"], schedule, run, args, choose, stop_signal)
        stages.resume(loop, args)
        startup_s = time.time() - started_at() - base_eval_s
        progress = loop.train()

        record = _task_record(args, data["train"], stages.logged_at(run, progress.best_step)) | lengths
        final = stages.save_best(loop, args, tokenizer, record)
        del engine, loop, choose
        stages.free_training_memory(accelerator)
        options = results.final_options(QuestionOptions, args, final, precision, splits)
        folder = run.path / "eval" / "final"
        evaluate_questions(folder, options, splits.test, run.accelerator, stop_signal, replace=True)
        parts = question_parts({question.id: question for question in splits.test})
        print_run_table(run.path, parts)
        results.finish(run, args, progress, lambda path: write_report(path, parts), startup_s, base_eval_s)


def _tokenise(
    args, config, tokenizer, splits: Splits, lengths: dict[str, int]
) -> dict[str, SpanData] | dict[str, GenerationData]:
    """The train and choosing splits as tokens for the run's head."""
    if args.head == "span":
        settings = QuestionSettings(**lengths)
        data = {name: span_data(tokenizer, getattr(splits, name), settings, config) for name in ("train", "validation")}
        if data["train"].features.num_lost:
            say(f"train: {data['train'].features.num_lost:,} answers stand whole in no window and do not teach")
        return data
    prompt = QuestionPrompt(uses_chat(args.prompt_format, tokenizer, args.model))
    window, shares = config.max_position_embeddings, can_share(config, attention_kernel(args.attention, config))
    encoded = {}
    for name, num_new_tokens in (("train", 0), ("validation", lengths["max_new_tokens"])):
        questions = getattr(splits, name)
        part = encode_questions(tokenizer, prompt, questions, lengths["max_length"], window, num_new_tokens)
        encoded[name] = replace(part, shares=shares)
    return encoded


def _task_record(args, train: SpanData | GenerationData, evaluated: dict) -> dict:
    """What task.json says of the task; `evaluated` is the best evaluation's line of metrics.jsonl."""
    record = {"task": TASK, "head": args.head, "labels": None}
    if args.head == "generate":
        return record | {"prompt": question_prompt_record(train.prompt), "thresholds": None}
    return record | {"prompt": None, "thresholds": {"null_odds": evaluated.get("eval_threshold")}}


def _options(args, precision: str, tokens_per_device: int, load_4bit: bool, split_record: dict) -> QuestionOptions:
    """How the model of the flags is evaluated."""
    return QuestionOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=precision,
        tokens_per_device=tokens_per_device,
        load_4bit=load_4bit,
        max_length=args.max_length,
        doc_stride=args.doc_stride,
        max_answer_length=args.max_answer_length,
        n_best=args.n_best,
        prompt_format=args.prompt_format,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        data_sha256=reporting_sha256(split_record),
    )


def _evaluate_base(run: RunFolder, args, config, precision: str, splits: Splits, stop_signal) -> float:
    """Evaluate the model as it is before training into eval/base. Returns the seconds.

    A causal model writes its answers after a prompt, also where a span head is to be trained; an encoder's span head is
    untrained."""
    started = time.perf_counter()
    if args.base_eval == "none":
        return 0.0
    questions = splits.test
    if args.base_eval == "subset":
        questions = first_paragraphs(questions, results.BASE_EVAL_ITEMS, args.split_seed, "base evaluation")
    options = _options(args, precision, args.tokens_per_device, args.method == "qlora", splits.record)
    if args.head == "span" and not answers_by_span(config, args.model, args.revision):
        options = replace(options, max_length=None)  # --max-length is of windows then
    folder = run.path / "eval" / "base"
    metrics = evaluate_questions(folder, options, questions, run.accelerator, stop_signal, replace=True)
    if is_main_process():
        say(f"base ({metrics['setting']}): {score_line(metrics)}")
    return time.perf_counter() - started


def evaluate(args) -> None:
    """Evaluate a model: by its span head where it has one, else by the answers that it writes."""
    args.model = model_or_default(args.model, args.sample, TASK)
    args.output_dir = args.output_dir or default_eval_folder(TASK, args.model)
    stop_signal = StopSignal()
    check_earlier_run(args.output_dir, args, says_finished=False)
    cpu.use_whole_cpu(tiny_model=args.sample)
    config, tokenizer = preflight.read_model_folder(args, TASK)
    check_evaluation_flags(args, config, tokenizer, read_record(args.model, args.revision))
    run_split = split_of_run(args.model, TASK)
    questions, record = load_test(data_settings(args), run_split)
    tokens_per_device = cpu.tokens_per_device(args.tokens_per_device, on_gpu=16384)
    options = _options(args, resolve_precision(args.precision, None), tokens_per_device, args.load_4bit, record)
    check_kernel_precision(options.attention, options.precision)
    if args.shots:
        source = load_shots(data_settings(args), run_split, questions)
        options = replace(options, shots=draw_solved_questions(source, args.shots, args.seed))
    check_earlier(args.output_dir, options.described(), items_of(options, questions))
    accelerator = launch.start_accelerator(None)

    with RunFolder(args.output_dir, accelerator, args) as run:
        run.describe(args, record)
        metrics = evaluate_questions(run.path, options, questions, accelerator, stop_signal)
        if is_main_process():
            print_scores(metrics)
            say(f"results in {run.path}")
        run.write_json("state.json", {"state": "finished", "reason": None})
