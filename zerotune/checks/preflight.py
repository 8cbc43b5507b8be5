"""Before anything is loaded or written: flags filled in, model folder and data read, what cannot work refused."""

import os
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json
from zerotune.models.final_folder import read_record
from zerotune.models.pretrained import check_labels, check_weight_files, load_tokenizer, read_config
from zerotune.models.tiny import tiny_causal_model
from zerotune.settings.groups import ModelSettings
from zerotune.settings.names import sample_model_folder
from zerotune.squad import questions as squad
from zerotune.squad import sample as squad_sample
from zerotune.tasks import sample as samples
from zerotune.tasks import sst2
from zerotune.tasks.split_settings import SETTING_NAMES

FULL_RATE, ADAPTER_RATE, HEAD_RATE_FACTOR = 2e-5, 2e-4, 5


# What the tokenizers of the tiny models are trained on, by task; IMDB's model is SST-2's.
SAMPLE_TEXTS = {sst2.TASK: samples.review_lines, squad.TASK: squad_sample.question_lines}


def read_model(settings: ModelSettings, task_name: str, labels: tuple[str, ...] = ()) -> tuple:
    """Configuration and tokenizer of --model, before any weight is loaded; of a classifier for these labels.

    Raises Refused as their readers do, and for a model that was tuned for another kind of task."""
    if settings.revision and os.path.isdir(settings.name):
        raise Refused(
            f"--revision {settings.revision} chooses a version of a hub model and {settings.name} is a folder: drop it"
        )
    for of_task, lines in SAMPLE_TEXTS.items():
        if Path(settings.name) == sample_model_folder(of_task):
            tiny_causal_model(sample_model_folder(of_task), lines)
    config = read_config(settings.name, settings.revision)
    check_tuned_for(settings.name, settings.revision, task_name)
    if labels:
        check_labels(config, labels)
    check_weight_files(settings.name)
    return config, load_tokenizer(settings.name, settings.revision)


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
