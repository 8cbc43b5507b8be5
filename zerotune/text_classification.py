"""A run on labelled texts, from its flags to its report: the stages that SST-2 and IMDB go through, in their order."""

from zerotune.checks import preflight
from zerotune.evaluation import prompt_seeds, results
from zerotune.evaluation.folder import check_earlier
from zerotune.evaluation.options import EvalOptions, check_options
from zerotune.evaluation.text_evaluation import evaluate_checkpoint, items_of
from zerotune.models.generator import load_language_model
from zerotune.models.pretrained import answers_by_prompt
from zerotune.run import cpu, launch
from zerotune.run.folder import RunFolder, check_earlier_run
from zerotune.run.process import is_main_process, say
from zerotune.run.stopping import StopSignal
from zerotune.settings.groups import ModelSettings
from zerotune.settings.precision import resolve_precision
from zerotune.settings.resolve import eval_settings, tokens_per_device
from zerotune.tasks.prompts import draw_shots
from zerotune.tasks.splits import Example
from zerotune.tasks.task_sources import load_test, reporting_sha256
from zerotune.tasks.task_splits import load_shots_source

# Of training on --sample with its tiny model; a flag that is given wins.
SAMPLE_DEFAULTS = {"epochs": 3, "learning_rate": 1e-3}


def evaluate(args, task) -> None:
    """Evaluate a model: a tuned final/ by its head, a causal model by the likelihood of its label words."""
    settings = eval_settings(args, task.TASK)
    args.model, args.output_dir = settings.model.name, settings.run.output_dir
    stop_signal = StopSignal()
    check_earlier_run(settings.run, says_finished=False)
    cpu.use_whole_cpu(tiny_model=args.sample)
    config, tokenizer = preflight.read_model(settings.model, task.TASK, task.LABELS)
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

    with RunFolder(settings.run, accelerator) as run:
        run.describe(record)
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
        tokens_per_device=tokens_per_device(args.tokens_per_device, on_gpu=16384),
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

    def load(settings: ModelSettings, device):
        if not held:
            held.append(load_language_model(settings, device))
        return held[0]

    return load
