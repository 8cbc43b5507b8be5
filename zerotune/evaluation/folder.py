"""Evaluate into a folder, for any task: a finished evaluation is not repeated, and an interrupted one is resumed."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.evaluation.scoring import BackOff, PartialScores, PreparedModel, is_finite, score_items
from zerotune.files import file_record, first_damage, json_sha256, read_json, write_json
from zerotune.metrics.evaluations import EVALUATE_AGAIN, read_metrics
from zerotune.models.model_files import model_identity
from zerotune.records import FileRecord
from zerotune.run.folder import RunFolder
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.run.process import installed_version, is_main_process, say
from zerotune.run.run_files import RESULT_FILES
from zerotune.terminal import say_when_slow

FINGERPRINT_FILE = ".fingerprint.json"


class Fingerprint(TypedDict):
    """.fingerprint.json: a hash of everything the results depend on, of each part by name, and of each result file."""

    sha256: str
    parts: dict[str, str]
    files: NotRequired[dict[str, FileRecord]]


@dataclass(frozen=True)
class Items:
    """The items that are evaluated.

    Attributes:
        lines: for each item its id and, after a tab, everything its score depends on.
        more: everything else that the scores depend on besides the settings, by name.
    """

    task: str
    lines: list[str]
    more: dict = field(default_factory=dict)


def evaluate_into(
    folder: Path,
    described: dict,
    items: Items,
    prepare: Callable[[], PreparedModel],
    write: Callable[[Any], dict],
    accelerator,
    stop_signal,
    overwrite: bool = False,
) -> dict:
    """Load a model and evaluate it, all ranks together.

    Args:
        described: the evaluation's settings as entries of metrics.json, including model, revision, dtype and
            tokens_per_device.
        prepare: loads the model; not called if the folder holds the results of the same evaluation.
        write: writes the model's answers into the folder and returns their scores; called on rank 0.
        stop_signal: a StopSignal, checked after each batch.
        overwrite: replace the results of another evaluation.
    Returns:
        The content of metrics.json.
    Raises:
        Refused: the folder holds another evaluation, the ranks' items or models differ, or scores are not finite.
        Preempted: a rank was asked to stop; finished batches are kept.
    """
    fingerprint = _fingerprint(described, items)
    if len(set(on_all_ranks(accelerator, json_sha256(fingerprint)))) > 1:
        raise Refused("the ranks have different items or models: put files on a disk that all nodes share")
    differing = from_rank_0(accelerator, lambda: _differing_parts(folder, fingerprint))
    if differing == []:
        say(f"{folder} holds these scores already: nothing is evaluated again")
        return from_rank_0(accelerator, lambda: read_metrics(folder / "metrics.json"))
    if not overwrite:
        _refuse_another(folder, differing)
    with _without_zero_init(accelerator):
        prepared = prepare()
    partial = PartialScores(folder, fingerprint | {"tokens_per_device": described["tokens_per_device"]})
    records = score_items(
        prepared.score if prepared.in_step else BackOff(prepared.score, prepared.costs),
        prepared.batches,
        accelerator,
        partial,
        on_batch=lambda: stop_signal.raise_when_noted(accelerator),
        activity=f"evaluation {folder}",
    )
    _refuse_not_finite(records, items.lines, described, partial)
    metrics = {}
    if is_main_process():
        with say_when_slow(f"scoring the answers of {folder}"):
            metrics = {"task": items.task} | described | prepared.description | write(prepared.read(records))
        write_json(folder / "metrics.json", metrics)
        parts = {name: json_sha256(value) for name, value in fingerprint.items()}
        files = {name: file_record(folder / name) for name in RESULT_FILES if (folder / name).exists()}
        write_json(folder / FINGERPRINT_FILE, {"sha256": json_sha256(fingerprint), "parts": parts, "files": files})
        partial.delete()
    return on_all_ranks(accelerator, metrics)[0]


def evaluate_before_training(
    run: RunFolder, items: str, evaluate: Callable[[Path], dict], line: Callable[[dict], str]
) -> None:
    """Evaluate into eval/base of a run, and print the scores; an earlier start of the run may have computed them.

    Args:
        items: what is evaluated, such as "872 test items".
        evaluate: (folder) -> metrics.
        line: (metrics) -> the scores in words.
    """
    folder = run.path / "eval" / "base"
    if not (folder / "metrics.json").is_file():
        say(f"base evaluation of {items}, before training")
    with run.timed("base_eval_s"):
        metrics = evaluate(folder)
    say(f"base ({metrics['setting']}): {line(metrics)}")


def check_earlier(folder: Path, described: dict, items: Items) -> None:
    """Refuse a folder that holds the results of another evaluation, before anything is written into it.

    Args:
        described: as for `evaluate_into`.
    """
    _refuse_another(folder, _differing_parts(folder, _fingerprint(described, items)))


def _refuse_another(folder: Path, differing: list[str] | None) -> None:
    if differing:
        listed = ", ".join(name.replace("_", " ") for name in differing)
        raise Refused(f"{folder} holds an evaluation that differs in {listed}: choose another --output-dir")


def _fingerprint(described: dict, items: Items) -> dict:
    """Return all that the results depend on: settings, items, the model's files and the libraries' versions."""
    inputs = {
        "tokens_per_device": None,
        "model_files": model_identity(described["model"], described["revision"]),
        "versions": [installed_version(name) for name in ("zerotune", "torch", "transformers")],
        "items": hashlib.sha256("\n".join(items.lines).encode()).hexdigest(),
    }
    return {"task": items.task} | described | items.more | inputs


def _differing_parts(folder: Path, fingerprint: dict) -> list[str] | None:
    """Return the names of the parts that differ from those of a folder's evaluation; None if a result file is missing.

    Raises:
        Refused: the fingerprint is damaged, or a result file of the same evaluation is.
    """
    if not all((folder / name).exists() for name in (FINGERPRINT_FILE, "metrics.json", "predictions.jsonl")):
        return None
    earlier = read_json(folder / FINGERPRINT_FILE, Fingerprint, EVALUATE_AGAIN)
    if earlier["sha256"] == json_sha256(fingerprint):
        files = earlier.get("files", {})
        if not all((folder / name).exists() for name in files):
            return None
        if damage := first_damage(folder, files):
            raise Refused(f"{folder / damage[0]} is damaged ({damage[1]}): {EVALUATE_AGAIN}")
        return []
    parts = earlier["parts"]
    return [name for name, value in fingerprint.items() if parts.get(name) != json_sha256(value)] or ["settings"]


def _refuse_not_finite(records: list[dict], lines: list[str], described: dict, partial: PartialScores) -> None:
    """Refuse scores that are not finite, naming the first item, and delete the partial scores."""
    line = next((line for record, line in zip(records, lines, strict=True) if not is_finite(record)), None)
    if line is None:
        return
    if is_main_process():  # another precision may follow in the same folder
        partial.delete()
        with contextlib.suppress(OSError):
            partial.folder.parent.rmdir()
            partial.folder.parent.parent.rmdir()
    raise Refused(
        f"{described['model']} gives scores that are not finite, first for {line.partition(chr(9))[0]}: its weights "
        f"are damaged, or --precision {described['dtype']} is too narrow; try fp32"
    )


@contextlib.contextmanager
def _without_zero_init(accelerator):
    """Return a context in which transformers loads a model whole, even under ZeRO-3: evaluation needs no shards."""
    plugin = accelerator.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # accelerate's zero3_init_context_manager leaves it set
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()
