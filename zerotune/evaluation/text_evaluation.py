"""Evaluating a classifier or a prompt on labelled texts, and writing what came of it: shared by SST-2 and IMDB."""

from pathlib import Path

from zerotune.evaluation.folder import Items, evaluate_into
from zerotune.evaluation.options import EvalOptions
from zerotune.evaluation.result_files import write_label_results
from zerotune.evaluation.scorers import LoadModel, prepare_classifier, prepare_prompt
from zerotune.evaluation.scoring import PreparedModel
from zerotune.metrics.labels import PredictedLabels
from zerotune.models.generator import load_language_model
from zerotune.models.pretrained import answers_by_prompt, read_config
from zerotune.tasks.splits import Example


def evaluate_checkpoint(
    folder: Path,
    options: EvalOptions,
    task,
    examples: list[Example],
    accelerator,
    stop_signal,
    replace: bool = False,
    load_model: LoadModel = load_language_model,
) -> dict:
    """Load a model and evaluate it into a folder, all ranks together, as `evaluate_into` does.

    A classifier (a final/ folder, or a published one) answers with its head, a causal model without one by the
    likelihood of the label words, an encoder without one with an untrained head, so labelled.

    Args:
        task: a task module (zerotune.tasks.sst2): TASK, LABELS, MAX_LENGTH, WORDINGS.
        load_model: what gives a causal model; several evaluations may share one.
    """
    config = read_config(options.model, options.revision)

    def prepare() -> PreparedModel:
        if answers_by_prompt(config):
            return prepare_prompt(options, task, examples, config, accelerator.device, load_model)
        return prepare_classifier(options, task, examples, config, accelerator.device)

    def write(predicted: PredictedLabels) -> dict:
        return write_label_results(folder, examples, predicted, task.LABELS)

    items = items_of(options, task, examples)
    return evaluate_into(folder, options, items, prepare, write, accelerator, stop_signal, replace)


def items_of(options: EvalOptions, task, examples: list[Example]) -> Items:
    """What tells an evaluation from others."""
    lines = [f"{example.id}\t{example.text}\t{example.label}" for example in examples]
    return Items(task.TASK, lines, {"prompt": task.WORDINGS[options.wording]})
