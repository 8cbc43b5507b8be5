"""A run on labelled texts, from its flags to its report: the stages that SST-2 and IMDB go through, in their order."""

import time

from zerotune.checks import preflight, run_checks
from zerotune.evaluation import prompt_seeds, results
from zerotune.evaluation.folder import check_earlier
from zerotune.evaluation.options import EvalOptions, answers_by_prompt, check_options
from zerotune.evaluation.text_evaluation import evaluate_checkpoint, items_of
from zerotune.models.language_model import load_language_model
from zerotune.report.run_report import write_report
from zerotune.run import cpu, launch
from zerotune.run.folder import RunFolder, check_earlier_run
from zerotune.run.process import is_main_process, say, started_at
from zerotune.run.stopping import StopSignal
from zerotune.settings.deepspeed import fill_deepspeed_config, read_deepspeed_config, zero_stage
from zerotune.settings.names import default_eval_folder, model_or_default
from zerotune.settings.precision import resolve_precision
from zerotune.tasks.prompts import draw_shots
from zerotune.tasks.splits import Example
from zerotune.tasks.task_sources import load_test, reporting_sha256
from zerotune.tasks.task_splits import load_shots_source, load_splits
from zerotune.training import stages
from zerotune.training.classification import LabelledData
from zerotune.training.generation import AnswerData, prompt_record
from zerotune.training.loop import Loop
from zerotune.training.schedule import schedule_for

# Of training on --sample with its tiny model; a flag that is given wins.
SAMPLE_DEFAULTS = {"epochs": 3, "learning_rate": 1e-3}


def train(args, task, engine_name: str = "loop") -> None:
    """Fine-tune a model, and report it against itself before training.

    Args:
        task: a task module (zerotune.tasks.sst2).
        engine_name: "loop", or "trainer" for the Hugging Face Trainer in its place.
    """
    stop_signal = StopSignal()
    preflight.settle_flags(args, task.TASK, SAMPLE_DEFAULTS)
    if check_earlier_run(args.output_dir, args):
        return
    run_checks.check_run_flags(args)

    # data and configuration: all that can be refused is refused here, before a weight is loaded or a file written
    cpu.use_whole_cpu(tiny_model=args.sample)
    splits = load_splits(task.ROWS, args)
    config, tokenizer = preflight.read_model_folder(args, task.TASK, task.LABELS)
    run_checks.check_model_flags(args, config)
    run_checks.check_head(args, config, tokenizer)
    deepspeed = read_deepspeed_config(args.deepspeed)
    precision = resolve_precision(args.precision, deepspeed)
    if engine_name == "trainer":
        run_checks.check_trainer_flags(args, precision, deepspeed)
    settings = preflight.model_settings(args, precision, zero_stage(deepspeed))
    data = None
    if is_main_process():  # the others wait at the process group, and find a classifier's tokens in the cache
        data = preflight.tokenise(args, config, tokenizer, task, splits)
        preflight.check_plan(args, settings, config, data["train"], len(task.LABELS), deepspeed)
    if args.plan:
        return
    filled = (
        None if deepspeed is None else fill_deepspeed_config(deepspeed, args.batch_size, args.max_grad_norm, precision)
    )
    accelerator = launch.start_accelerator(filled)

    with RunFolder(args.output_dir, accelerator, args) as run:
        data = data or preflight.tokenise(args, config, tokenizer, task, splits)
        stop_signal.raise_when_noted(accelerator, "preparation")
        stages.start_run(run, args, splits, data, precision, filled)
        base_eval_s = results.evaluate_base(run, args, precision, task, splits, stop_signal)

        build_engine, loop_class = _engine_parts(engine_name)
        engine = build_engine(run, args, settings, config, tokenizer, task.LABELS, data["train"])
        schedule = schedule_for(args, len(splits.train))
        # the Trainer could not do an interrupted evaluation again: it loads a checkpoint only when it trains
        heed = (lambda: stop_signal.raise_when_noted(accelerator)) if engine_name == "loop" else (lambda: None)
        choose = stages.choosing_evaluation(engine, data["choose"], schedule, args, stages.choosing_values, heed)
        loop = loop_class(engine, data["train"], schedule, run, args, choose, stop_signal)
        stages.resume(loop, args)
        startup_s = time.time() - started_at() - base_eval_s
        progress = loop.train()

        final = stages.save_best(loop, args, tokenizer, _task_record(args, task, data["train"]))
        del engine, loop, choose
        stages.free_training_memory(accelerator)
        metrics = results.evaluate_final(run, args, final, precision, task, splits, stop_signal)
        results.print_results(run, metrics)
        texts = {example.id: example.text for example in splits.test}
        results.finish(run, args, progress, lambda path: write_report(path, texts), startup_s, base_eval_s)


def _task_record(args, task, train: LabelledData | AnswerData) -> dict:
    """What task.json says of the task."""
    return {
        "task": task.TASK,
        "head": args.head,
        "prompt": prompt_record(train.prompt) if args.head == "generate" else None,
        "labels": list(task.LABELS),
        "max_length": args.max_length,
        "truncation": args.truncation,
        "thresholds": None,
    }


def _engine_parts(name: str) -> tuple:
    if name == "loop":
        return stages.build_engine, Loop
    from zerotune.training import trainer as trainer_engine  # importing the Trainer takes seconds

    return trainer_engine.build_engine, trainer_engine.TrainerLoop


def evaluate(args, task) -> None:
    """Evaluate a model: a tuned final/ by its head, a causal model by the likelihood of its label words."""
    args.model = model_or_default(args.model, args.sample, task.TASK)
    args.output_dir = args.output_dir or default_eval_folder(task.TASK, args.model)
    stop_signal = StopSignal()
    check_earlier_run(args.output_dir, args, says_finished=False)
    cpu.use_whole_cpu(tiny_model=args.sample)
    config, tokenizer = preflight.read_model_folder(args, task.TASK, task.LABELS)
    run_split = preflight.split_of_run(args.model, task.TASK)
    test, record = load_test(task.ROWS, args, run_split)
    shots_source = load_shots_source(task.ROWS, args, run_split, test) if args.shots else []
    if args.prompt_seeds:
        prompt_seeds.check_count(args, task, answers_by_prompt(config))
    all_options = [_options(args, task, shots_source, record, number) for number in range(args.prompt_seeds or 1)]
    folders = [args.output_dir / f"seed-{number}" for number in range(args.prompt_seeds or 0)] or [args.output_dir]
    for folder, options in zip(folders, all_options, strict=True):
        check_options(options, config, tokenizer)
        check_earlier(folder, options, items_of(options, task, test))
    accelerator = launch.start_accelerator(None)

    with RunFolder(args.output_dir, accelerator, args) as run:
        run.describe(args, record)
        load_model = _loaded_once()
        for number, (folder, options) in enumerate(zip(folders, all_options, strict=True)):
            metrics = evaluate_checkpoint(folder, options, task, test, accelerator, stop_signal, load_model=load_model)
            named = f"seed {number}, " if args.prompt_seeds else ""
            say(f"{named}{metrics['setting']}: {results.accuracy_line(metrics)}; results in {folder}")
        if args.prompt_seeds and is_main_process():
            prompt_seeds.write_summary(run.path, args.prompt_seeds)
        run.write_json("state.json", {"state": "finished", "reason": None})


def _options(args, task, shots_source: list[Example], record: dict, number: int) -> EvalOptions:
    """Options of one prompt seed: number 0 is what is evaluated without --prompt-seeds."""
    seed = args.seed + number
    return EvalOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=resolve_precision(args.precision, None),
        max_length=args.max_length,
        tokens_per_device=cpu.tokens_per_device(args.tokens_per_device, on_gpu=16384),
        load_4bit=args.load_4bit,
        prompt_format=args.prompt_format,
        calibrate=args.calibrate,
        answer_by=args.answer_by,
        shots=draw_shots(shots_source, args.shots, len(task.LABELS), seed) if args.shots else (),
        wording=number % len(task.WORDINGS),
        seed=seed,
        data_sha256=reporting_sha256(record),
    )


def _loaded_once():
    """load_language_model for evaluations of one model with several prompts: they share it."""
    held = []

    def load(options: EvalOptions, device):
        if not held:
            held.append(load_language_model(options, device))
        return held[0]

    return load
