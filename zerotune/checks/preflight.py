"""Before anything is loaded or written: flags filled in, model folder and data read, what cannot work refused."""

from pathlib import Path

from zerotune.models import pretrained
from zerotune.models.tiny import tiny_causal_model
from zerotune.settings.groups import ModelSettings
from zerotune.settings.names import sample_model_folder
from zerotune.squad import questions as squad
from zerotune.squad import sample as squad_sample
from zerotune.tasks import sample as samples
from zerotune.tasks import sst2

FULL_RATE, ADAPTER_RATE, HEAD_RATE_FACTOR = 2e-5, 2e-4, 5


# What the tokenizers of the tiny models are trained on, by task; IMDB's model is SST-2's.
SAMPLE_TEXTS = {sst2.TASK: samples.review_lines, squad.TASK: squad_sample.question_lines}


def read_model(settings: ModelSettings, task_name: str, labels: tuple[str, ...] = ()) -> tuple:
    """Do `pretrained.read_model`, once --sample's tiny models are there."""
    for of_task, lines in SAMPLE_TEXTS.items():
        if Path(settings.name) == sample_model_folder(of_task):
            tiny_causal_model(sample_model_folder(of_task), lines)
    return pretrained.read_model(settings, task_name, labels)
