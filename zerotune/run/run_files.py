"""The records in a run folder: their forms, and a check of all of them."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

from annotated_types import Ge
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import is_there, read_json, read_json_lines
from zerotune.records import RESTORE, Count
from zerotune.settings.groups import DataSettings

SWEEP_RECORD = "sweep.json"  # in the parent folder of several runs
# All files that evaluations write; which of them depends on the task.
RESULT_FILES = ("metrics.json", "predictions.jsonl", "predictions.json", "breakdown.json", "submission.tsv")


class State(TypedDict):
    """state.json."""

    state: Literal["running", "preempted", "refused", "finished"]
    reason: NotRequired[str | None]


class World(TypedDict):
    """run.json's entry about processes and device."""

    num_processes: NotRequired[Annotated[int, Ge(1)]]
    device: NotRequired[str]


class RunRecord(TypedDict):
    """run.json."""

    flags: dict[str, Any]
    run_id: NotRequired[str]
    typed_flags: NotRequired[list[str]]
    identity: NotRequired[dict[str, Any]]
    world: NotRequired[World]
    timings: NotRequired[dict[str, float | None]]
    task: NotRequired[str]
    command: NotRequired[str]
    versions: NotRequired[dict[str, str | None]]
    git_commit: NotRequired[str | None]


class MetricsLine(TypedDict, extra_items=float | None):
    """A line of metrics.jsonl: a logged step or an evaluation."""

    step: Count


class ParameterCounts(TypedDict):
    """One of parameters.json's two tables."""

    total: Count
    trainable: Count
    head: Count
    groups: dict[str, Count]


class Movement(TypedDict, total=False):
    """parameters.json's entry about how far training moved the weights: a share by module group, and by layer."""

    groups: dict[str, float]
    layers: list[float]
    reason: str


class ParametersRecord(TypedDict):
    """parameters.json: the weights of the model as published, and as it is trained."""

    before: ParameterCounts
    after: ParameterCounts
    moved: NotRequired[Movement]


class SweepRecord(TypedDict):
    """sweep.json: the script, the flags that all runs share, and the flags of each run by its folder's name."""

    script: str
    flags: dict[str, Any]
    sweep: dict[str, list[str]]
    seeds: list[int]
    runs: dict[str, list[str]]


class SourceRecord(TypedDict):
    """split.json's entry for a source of rows: a file, a hub data set or a sample."""

    sha256: str
    rows: NotRequired[Count]
    path: NotRequired[str]
    dataset: NotRequired[str]
    sample: NotRequired[str]
    revision: NotRequired[str | None]


class PartRecord(TypedDict):
    """split.json's entry for a part."""

    count: Count
    labels: NotRequired[dict[str, Count] | None]
    ids_sha256: str


class SplitRecord(TypedDict, total=False):
    """split.json of a run or an evaluation: the keys that both have."""

    task: str
    rule: str
    splits: dict[str, PartRecord]
    sources: dict[str, SourceRecord]
    notes: list[str]
    removed_rows: dict[str, Count]


class _TrainSource(TypedDict, extra_items=SourceRecord):
    train: SourceRecord


_SIZES = ("train_size", "validation_size", "test_size", "limit_train", "limit_eval")
_SETTINGS = DataSettings.__annotations__ | dict.fromkeys(_SIZES, Annotated[int, Ge(1)] | None)


class RunSplit(SplitRecord):
    """split.json of a run, with all that is needed to rebuild its parts."""

    splits: Required[dict[str, PartRecord]]
    sources: Required[_TrainSource]
    settings: Required[TypedDict("SettingsRecord", _SETTINGS, closed=True)]


def read_state(folder: Path) -> State | dict:
    """Return state.json, or {} when there is none. Raises Refused where it is damaged."""
    path = folder / "state.json"
    return read_json(path, State) if is_there(path) else {}


def read_run_record(path: Path) -> RunRecord:
    """Return a run.json. Raises Refused where it is damaged."""
    return read_json(path, RunRecord)


def read_sweep(folder: Path) -> SweepRecord:
    """Return the sweep.json of the parent folder of several runs. Raises Refused where it is damaged."""
    return read_json(folder / SWEEP_RECORD, SweepRecord)


def read_metrics_lines(path: Path) -> list[MetricsLine]:
    """Return the lines of a metrics.jsonl. Raises Refused where one is damaged."""
    return read_json_lines(path, MetricsLine)


def read_split(path: Path) -> RunSplit:
    """Return a run's split.json, from which its parts can be rebuilt. Raises Refused where it is damaged."""
    return read_json(path, RunSplit, "restore it, or copy final/ out of the run's folder and give --test-file")


def check_run_files(folder: Path) -> None:
    """Check all records that exist in the folder of a run or an evaluation.

    Raises:
        Refused: one is damaged; the line names it with the key, the value found and the value wanted. In a finished
            run, a metrics.jsonl whose last line has no end counts as damaged.
    """
    is_finished = read_state(folder).get("state") == "finished"
    is_training = "identity" in read_run_record(folder / "run.json")
    if (folder / "split.json").exists():
        read_split(folder / "split.json") if is_training else read_json(folder / "split.json", SplitRecord)
    if (folder / "parameters.json").exists():
        read_json(folder / "parameters.json", ParametersRecord)
    metrics = folder / "metrics.jsonl"
    read_metrics_lines(metrics)
    if is_finished and metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
        raise Refused(f"{metrics} is damaged (its last line has no end): {RESTORE}")
