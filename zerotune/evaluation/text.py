"""Evaluate a model on labelled text into a folder."""

from dataclasses import replace
from pathlib import Path

from zerotune.errors import listed
from zerotune.evaluation.by_head import prepare_head
from zerotune.evaluation.by_prompt import SharedModel, prepare_prompt
from zerotune.evaluation.folder import Items, check_earlier, evaluate_before_training, evaluate_into
from zerotune.evaluation.options import TextEvaluation, base_model, check_flags, tuned_model
from zerotune.evaluation.result_files import write_label_results, write_label_set_results
from zerotune.evaluation.scoring import PreparedModel
from zerotune.files import read_json
from zerotune.metrics.label_sets import PredictedLabelSets
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.divided import divided_where_large
from zerotune.models.model_files import generator_record
from zerotune.models.multi_label import check_multi_label
from zerotune.models.pretrained import answers_by_prompt, check_texts, load_tokenizer, read_config
from zerotune.run.folder import RunFolder
from zerotune.run.process import say
from zerotune.settings.groups import PromptSettings, TextSettings, TrainSettings
from zerotune.tasks.split_file import reporting_sha256
from zerotune.tasks.splits import TEST_LIMIT, Example, Splits, stratified_subset

BASE_EVAL_ITEMS = 1000


def evaluate(
    folder: Path,
    evaluation: TextEvaluation,
    task,
    examples: list[Example],
    accelerator,
    stop_signal,
    overwrite: bool = False,
    shared: SharedModel | None = None,
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together, as `evaluate_into` does.

    A classifier (a final/ folder, or a published one) answers with its head, a causal model without a head by a prompt.
    An encoder without a head answers with an untrained one, and metrics.json says so.

    Args:
        task: zerotune.tasks.texts.TextTask.
        shared: gives several evaluations the same causal model.
    Returns:
        The content of metrics.json.
    """
    config = read_config(evaluation.model.name, evaluation.model.revision)
    by_prompt = answers_by_prompt(config)

    def prepare() -> PreparedModel:
        model = divided_where_large(evaluation.model, config, by_prompt, accelerator)
        loaded = replace(evaluation, model=model)
        if by_prompt:
            asked = shared or SharedModel(load_tokenizer(model.name, model.revision))
            return prepare_prompt(loaded, task, examples, config, accelerator.device, asked)
        return prepare_head(loaded, task, examples, config, accelerator.device)

    def write(predicted: PredictedLabels | PredictedLabelSets) -> dict:
        write_results = write_label_set_results if task.multi_label else write_label_results
        return write_results(folder, examples, predicted, task.labels)

    described, items = evaluation.described(), text_items(evaluation, task, examples)
    return evaluate_into(folder, described, items, prepare, write, accelerator, stop_signal, overwrite)


def check_evaluation(
    folder: Path, evaluation: TextEvaluation, task, examples: list[Example], config, tokenizer
) -> None:
    """Refuse flags that this model would ignore or cannot follow, and a folder with another evaluation's results."""
    check_multi_label(evaluation.model, config, task.multi_label)
    check_flags(evaluation, config, tokenizer)
    check_texts(evaluation.model.name, config, tokenizer, (each.text for each in (*evaluation.shots, *examples)))
    check_earlier(folder, evaluation.described(), text_items(evaluation, task, examples))


def text_items(evaluation: TextEvaluation, task, examples: list[Example]) -> Items:
    """Return the items of an evaluation with everything that their scores depend on besides its settings."""
    lines = [f"{example.id}\t{example.text}\t{example.label}" for example in examples]
    shots = [[shot.id, shot.text, shot.label] for shot in evaluation.shots]
    more = {"shots": shots, "prompt": task.wordings[evaluation.wording]}
    return Items(task.name, lines, more | ({"multi_label": True} if task.multi_label else {}))


def evaluate_base(run: RunFolder, settings: TrainSettings, task, splits: Splits, stop_signal) -> None:
    """Evaluate the model before training into eval/base, zero-shot if it is causal.

    A causal model is skipped with --multi-label, because a prompt gives only one label."""
    if settings.run.base_eval == "none":
        return
    if task.multi_label and answers_by_prompt(read_config(settings.model.name, settings.model.revision)):
        say("base: not evaluated, because a prompt gives only one label and --multi-label any number")
        return
    record = generator_record(settings.model)
    if record is not None and record["labels"] != list(task.labels):
        say(f"base: not evaluated, because it was tuned for other labels, {listed(record['labels'])}")
        return
    test = splits.test
    if settings.run.base_eval == "subset":
        test = stratified_subset(test, BASE_EVAL_ITEMS, settings.data.split_seed, TEST_LIMIT)
    evaluation = TextEvaluation(
        model=base_model(settings.model),
        text=settings.text,
        prompt=settings.prompt,
        tokens_per_device=settings.optimisation.tokens_per_device,
        seed=settings.optimisation.seed,
        as_generator=settings.head == "generate",
        data_sha256=reporting_sha256(splits.record),
    )

    def evaluate_into_base(folder: Path) -> dict:
        return evaluate(folder, evaluation, task, test, run.accelerator, stop_signal, overwrite=True)

    evaluate_before_training(run, f"{len(test):,} test items", evaluate_into_base, accuracy_line)


def evaluate_final(run: RunFolder, settings: TrainSettings, final: Path, task, splits: Splits, stop_signal) -> None:
    """Evaluate the reloaded final/ on all test items into eval/final, as its task.json says."""
    evaluation = TextEvaluation(
        model=tuned_model(str(final), settings.model),
        text=TextSettings(),
        prompt=PromptSettings(),
        tokens_per_device=settings.optimisation.tokens_per_device,
        data_sha256=reporting_sha256(splits.record),
    )
    folder = run.path / "eval" / "final"
    metrics = evaluate(folder, evaluation, task, splits.test, run.accelerator, stop_signal, overwrite=True)
    say(f"tuned (step {read_json(final / 'task.json')['best_step']}): {accuracy_line(metrics)}")


def accuracy_line(metrics: dict) -> str:
    """Return a line with the accuracy and its 95 % interval, or the number of predictions if items have no labels.

    If items have any number of labels, it has exact match and micro F1 with their intervals instead."""
    names = [name for name in ("accuracy", "exact_match", "f1_micro") if name in metrics]
    if not names:
        return f"{metrics['count']:,} predictions (the items have no labels)"
    scores = [
        "{} {:.4f} [{:.4f}, {:.4f}]".format(name.replace("_", " "), metrics[name], *metrics[f"{name}_ci95"])
        for name in names
    ]
    unparsable = f", {metrics['num_unparsable']:,} of them unparsable" if metrics.get("num_unparsable") else ""
    return f"{', '.join(scores)} on {metrics['count']:,} items{unparsable}"
