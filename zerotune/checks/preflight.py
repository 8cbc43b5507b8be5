"""Before anything is loaded or written: flags filled in, model folder and data read, what cannot work refused."""

import os
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import read_json
from zerotune.models import pretrained
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
    """Do `pretrained.read_model`, once --sample's tiny models are there."""
    for of_task, lines in SAMPLE_TEXTS.items():
        if Path(settings.name) == sample_model_folder(of_task):
            tiny_causal_model(sample_model_folder(of_task), lines)
    return pretrained.read_model(settings, task_name, labels)


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
