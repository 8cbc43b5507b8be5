"""Default names of run folders and models, known without loading anything."""

import os
import re
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import default_cache_dir

TASK_NAMES = {"sst2": "SST-2", "imdb": "IMDB", "classify": "own labels", "squad": "SQuAD v2"}
# The data sets on the hub of the tasks that have one. All are English, and so are the samples.
DATASETS = {"sst2": "stanfordnlp/sst2", "imdb": "stanfordnlp/imdb", "squad": "rajpurkar/squad_v2"}
DEFAULT_MODEL = "distilbert/distilbert-base-uncased"


def short_name(model: str) -> str:
    """Return the last part of a hub id or path, fit for a folder name.

    A run's final/ goes by the run's name, and a snapshot in the hub's cache by its model's."""
    if snapshot := re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", str(model)):
        model = snapshot[1].replace("--", "/")
    parts = [part for part in re.split(r"[/\\]", str(model)) if part not in ("", ".", "..")]
    if parts and parts[-1] == "final":
        parts.pop()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "model").lower()


def folder_name(model: str) -> str:
    """Return the last part of a folder's path; a run's final/ goes by the run's name."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "final" else path.name


def sample_model_folder(task_name: str) -> Path:
    """Return the folder of a task's tiny model for --sample, the same for train and eval."""
    return default_cache_dir() / ("sample-llama-squad" if task_name == "squad" else "sample-llama")


def is_sample_model(model: str) -> bool:
    """Return whether a model is one of the tiny ones of --sample."""
    return Path(model) in map(sample_model_folder, ("sst2", "squad"))


def model_or_default(model: str | None, is_sample: bool, task_name: str) -> str:
    """Return --model; where it is not given, --sample's tiny model, else DistilBERT."""
    return model or (str(sample_model_folder(task_name)) if is_sample else DEFAULT_MODEL)


def check_names_model(model: str | None, is_sample: bool = False) -> None:
    """Refuse an evaluation or a prediction without --model: training's default has no head that could answer."""
    if model is None and not is_sample:
        raise Refused("--model is missing: give a run's folder, an adapter, or a hub id")


def default_run_folder(task_name: str, model: str, method: str, head: str | None) -> Path:
    """Return the default of a train script's --output-dir."""
    generates = "-generate" if head == "generate" else ""
    return Path("runs") / f"{task_name}-{short_name(model)}-{method}{generates}"


def default_eval_folder(task_name: str, model: str) -> Path:
    """Return the default of an eval script's --output-dir."""
    return Path("runs") / f"eval-{task_name}-{short_name(model)}"


def final_of_run(name: str) -> str:
    """Return the final/ of a run folder, a folder without a slash at its end, and any other model unchanged.

    Raises:
        Refused: the run has no final/ yet.
    """
    folder = Path(name)
    if (folder / "config.json").exists() or not (folder / "run.json").exists():
        return str(folder) if folder.is_dir() else name
    if not (folder / "final").is_dir():
        raise Refused(f"the run {name} has no final/ yet: start its command again until it is finished")
    return str(folder / "final")
