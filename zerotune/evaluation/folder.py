"""An evaluation into a folder, whatever the task: the same one is not done twice, and an interrupted one goes on."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from zerotune.errors import Refused
from zerotune.evaluation.options import EvalOptions, QuestionOptions
from zerotune.evaluation.scoring import BackOff, PartialScores, PreparedModel, is_finite, score_items
from zerotune.files import json_sha256, read_json, write_json
from zerotune.models.model_files import model_identity
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.run.process import is_main_process

FINGERPRINT_FILE = ".fingerprint.json"


@dataclass(frozen=True)
class Items:
    """What is evaluated.

    Attributes:
        lines: of each item its id and, after a tab, all that its score depends on.
        more: what the scores depend on beside options and items, by name.
    """

    task: str
    lines: list[str]
    more: dict = field(default_factory=dict)


def evaluate_into(
    folder: Path,
    options: EvalOptions | QuestionOptions,
    items: Items,
    prepare: Callable[[], PreparedModel],
    write: Callable[[Any], dict],
    accelerator,
    stop_signal,
    replace: bool = False,
) -> dict:
    """Load a model and evaluate it, all ranks together.

    Args:
        prepare: loads the model; not called where the folder holds the results of the same evaluation.
        write: the model's answers -> their scores, once they are written into the folder; called on rank 0.
        stop_signal: a StopSignal, heeded after each batch.
        replace: results of another evaluation in the folder make room.
    Returns:
        The content of metrics.json.
    Raises:
        Refused: the folder holds another evaluation; scores are not finite.
        Preempted: a rank was asked to stop; what is scored is kept.
    """
    described, fingerprint = _describe(options, items)
    if len(set(on_all_ranks(accelerator, json_sha256(fingerprint)))) > 1:
        raise Refused("the ranks have different items or models: put files on a disk that all nodes share")
    differing = from_rank_0(accelerator, lambda: _differences(folder, fingerprint))
    if differing == []:
        return from_rank_0(accelerator, lambda: read_json(folder / "metrics.json"))
    if not replace:
        _refuse_another(folder, differing)
    with _without_zero_init(accelerator):
        ready = prepare()
    partial = PartialScores(folder, fingerprint | {"tokens_per_device": options.tokens_per_device})
    score = BackOff(ready.score, ready.costs)
    records = score_items(score, ready.batches, accelerator, partial, lambda: stop_signal.raise_when_noted(accelerator))
    if (line := _not_finite(records, items.lines, options)) is not None:
        if is_main_process():  # what was scored is of no use, and the cure is another precision
            partial.delete()
            with contextlib.suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()
        raise Refused(line)
    metrics = {}
    if is_main_process():
        metrics = described | {"shots": len(options.shots)} | ready.description | write(ready.read(records))
        write_json(folder / "metrics.json", metrics)
        parts = {name: json_sha256(value) for name, value in fingerprint.items()}
        write_json(folder / FINGERPRINT_FILE, {"sha256": json_sha256(fingerprint), "parts": parts})
        partial.delete()
    return on_all_ranks(accelerator, metrics)[0]


def check_earlier(folder: Path, options: EvalOptions | QuestionOptions, items: Items) -> None:
    """Refuse a folder that holds the results of another evaluation, before anything is written into it."""
    _refuse_another(folder, _differences(folder, _describe(options, items)[1]))


def _refuse_another(folder: Path, differing: list[str] | None) -> None:
    if differing:
        listed = ", ".join(name.replace("_", " ") for name in differing)
        raise Refused(f"{folder} holds an evaluation that differs in {listed}: choose another --output-dir")


def _describe(options: EvalOptions | QuestionOptions, items: Items) -> tuple[dict, dict]:
    """How the items are scored; and all that the results depend on: that, the model's files, and the items."""
    described = {"task": items.task, **asdict(options), "dtype": options.precision}
    del described["precision"]  # here the name of a score
    fingerprint = {
        "tokens_per_device": None,
        "model_files": model_identity(options.model, options.revision),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
        "items": hashlib.sha256("\n".join(items.lines).encode()).hexdigest(),
    }
    return described, described | items.more | fingerprint


def _differences(folder: Path, fingerprint: dict) -> list[str] | None:
    """In what a folder's results are not those of this evaluation: [] where they are, None where there are none."""
    if not all((folder / name).exists() for name in (FINGERPRINT_FILE, "metrics.json", "predictions.jsonl")):
        return None
    earlier = read_json(folder / FINGERPRINT_FILE)
    if earlier.get("sha256") == json_sha256(fingerprint):
        return []
    parts = earlier.get("parts")
    if not isinstance(parts, dict):
        return ["its model, items or settings"]
    return [name for name, value in fingerprint.items() if parts.get(name) != json_sha256(value)] or ["settings"]


@contextlib.contextmanager
def _without_zero_init(accelerator):
    """A context in which transformers loads a model whole, also under ZeRO-3: evaluation needs no shards."""
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


def _not_finite(records: list[dict], lines: list[str], options: EvalOptions | QuestionOptions) -> str | None:
    """Return what to say of records with numbers that are not finite, naming the first item; None where all are."""
    broken = next((line for record, line in zip(records, lines, strict=True) if not is_finite(record)), None)
    if broken is None:
        return None
    return (
        f"{options.model} gives scores that are not finite, first for {broken.partition(chr(9))[0]}: its "
        f"weights are damaged, or --precision {options.precision} is too narrow; try fp32"
    )
