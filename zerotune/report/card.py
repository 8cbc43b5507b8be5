"""Complete the model card of a finished run: final/README.md gets its scores, data, training and limits.

The additions come from the run folder's files; zerotune/models/model_card.py has written the rest.
"""

import os
from collections.abc import Mapping

from zerotune.errors import quoted
from zerotune.files import read_json, write_text
from zerotune.metrics import evaluations
from zerotune.metrics.evaluations import Evaluation
from zerotune.models.base_license import LICENSE_HEADING
from zerotune.report import html
from zerotune.run.machine_paths import without_paths
from zerotune.settings.names import DATASETS, TASK_NAMES
from zerotune.tasks.hub import id_and_configuration

# The first section written here; it and all later sections of an earlier card are replaced.
_FIRST = "## Scores"
# The sentence of the card that gets the name of the train rows.
_TRAINED = "Trained with zerotune."
# The hub's names of scores, where they differ from ours. Scores of one label are left out of the front matter.
_HUB_METRICS = {
    "matthews": "matthews_correlation", "exact": "exact_match", "exact_match": "exact_match", "rouge1": "rouge",
    "rouge2": "rouge", "rougeL": "rouge", "hamming_loss": "hamming_loss",
}  # fmt: skip
_OF_ONE_LABEL = ("accuracy_", "f1_label_")
_TRAINING_FLAGS = (
    "method", "lora_rank", "lora_alpha", "batch_size", "learning_rate", "head_learning_rate", "schedule", "seed",
)  # fmt: skip


def complete_card(files, comparison: str) -> None:
    """Name the train rows in a run's final/README.md, and add sections from its evaluations and records.

    Without that file, do nothing.

    Args:
        files: RunFiles of the finished run.
        comparison: the paired test of base and tuned model in words, or why there is none.
    """
    path = files.path / "final" / "README.md"
    if not path.is_file():
        return
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8"))
    record = read_json(path.with_name("task.json"))
    for name, value in _front_matter(files).items():
        card.data[name] = value
    before, _, license_text = card.text.partition(f"\n{LICENSE_HEADING}\n")
    sections = [_scores(files, comparison), _data(files.split), _training(files), _limits(files, record)]
    added = without_paths("\n\n".join(sections), files.path)
    about, last = before.partition(f"\n{_FIRST}\n")[0].rstrip(), f"{LICENSE_HEADING}\n{license_text}"
    if train := (files.split.get("sources") or {}).get("train"):
        name = ("a " if train.get("sample") else "") + _title_of(train, files.split.get("task"))
        about = about.replace(_TRAINED, f"{_TRAINED[:-1]} on {name}.", 1)
    card.text = "\n\n".join([about, added, last if license_text else ""]).rstrip() + "\n"
    write_text(path, str(card))


def _front_matter(files) -> dict:
    """Return the hub's entries about data and scores: datasets, language, metrics and the model index."""
    from huggingface_hub import EvalResult

    sources, task = files.split.get("sources") or {}, files.split.get("task")
    datasets = sorted({id_and_configuration(one["dataset"])[0] for one in sources.values() if one.get("dataset")})
    is_english = bool(sources) and all(one.get("sample") or _is_own_dataset(one, task) for one in sources.values())
    data = {"datasets": datasets or None, "language": "en" if is_english else None}
    if not isinstance(files.tuned, Evaluation):
        return data
    metrics, tested = files.tuned.metrics, sources.get("test") or sources.get("train") or {}
    names = [name for name in evaluations.score_names(metrics) if not name.startswith(_OF_ONE_LABEL)]
    dataset, configuration = id_and_configuration(tested.get("dataset") or "")
    results = [
        EvalResult(
            task_type="text-classification" if metrics.get("task") != "squad" else "question-answering",
            dataset_type=dataset or ("sample" if tested.get("sample") else "own-data"),
            dataset_name=dataset or _title_of(tested, task),
            dataset_config=configuration,
            dataset_split=(tested.get("split") or "test") if "test" in sources else f"{files.split.get('rule')} test",
            dataset_revision=tested.get("revision"),
            metric_type=_metric_type(name),
            metric_value=metrics[name],
            metric_name=_metric_name(metrics, name),
        )
        for name in names
        if metrics[name] is not None
    ]
    kinds = list(dict.fromkeys(result.metric_type for result in results))
    return data | {"metrics": kinds, "model_name": files.path.resolve().name, "eval_results": results}


def _metric_type(name: str) -> str:
    """Return the hub's metric of a score: f1 for f1_macro and HasAns_f1."""
    name = name.removeprefix("HasAns_").removeprefix("NoAns_")
    return _HUB_METRICS.get(name) or name.partition("_")[0]


def _metric_name(metrics: Mapping, name: str) -> str:
    """Return a score's name with its interval, for which a model index has no field."""
    interval = metrics[f"{name}_ci95"]
    return f"{name} (95% interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else name


def _name_of(source: Mapping) -> str:
    return os.path.basename(str(source.get("dataset") or source.get("path") or source.get("sample") or "?"))


def _is_own_dataset(source: Mapping, task: str | None) -> bool:
    return task in DATASETS and source.get("dataset") == DATASETS[task]


def _title_of(source: Mapping, task: str | None) -> str:
    """Return the name of a source's data: the task's only for its own data set, SST-2."""
    title = TASK_NAMES.get(task, str(task))
    if source.get("sample"):
        return f"made-up sample for {title}"
    return title if _is_own_dataset(source, task) else _name_of(source)


def _scores(files, comparison: str) -> str:
    """Return the comparison of base and tuned: a table with intervals, and the paired test in words."""
    found = [("base", files.base), ("this model", files.tuned)]
    columns = [(name, evaluations.as_proportions(one.metrics)) for name, one in found if isinstance(one, Evaluation)]
    if not columns:
        return f"{_FIRST}\n\n{files.tuned}"
    heads = [f"{name}, {metrics['setting']}" for name, metrics in columns]
    rows = [["items", *(f"{metrics['count']:,}" for _, metrics in columns)]]
    for name in dict.fromkeys(name for _, metrics in columns for name in evaluations.score_names(metrics)):
        cells = [html.score_cell(metrics, name) for _, metrics in columns]
        rows.append([html.metric_title(name), *(cell if isinstance(cell, str) else " ".join(cell) for cell in cells)])
    tested = _name_of((files.split.get("sources") or {}).get("test") or {})
    where = f" The items are the test split of {tested}, which took no part in training." if tested != "?" else ""
    note = "In brackets: 95 % intervals, Wilson for proportions and bootstrap over items for the other scores."
    return "\n\n".join([_FIRST, _table(["", *heads], rows), comparison + where, note])


def _data(split: Mapping) -> str:
    """Return the splits with their counts and hashes, and the sources with theirs."""
    parts = [
        [name, f"{one['count']:,}", _shares(one.get("labels")), f"`{one['ids_sha256'][:16]}`"]
        for name, one in (split.get("splits") or {}).items()
    ]
    sources = [
        [name, _name_of(one) + (f" at {one['revision']}" if one.get("revision") else ""), f"`{one['sha256']}`"]
        for name, one in (split.get("sources") or {}).items()
    ]
    rule = f"Split rule: {split.get('rule')}, split seed {split.get('split_seed')}."
    notes = "\n".join(f"- {note}" for note in split.get("notes") or [])
    tables = [
        _table(["split", "rows", "labels", "sha256 of ids"], parts),
        _table(["source", "", "sha256 of the rows"], sources),
    ]
    return "\n\n".join(part for part in ["## Data", *tables, rule, notes] if part)


def _shares(labels: Mapping | None) -> str:
    """Return the counts of up to ten labels."""
    counts = [f"{quoted(label)} {count:,}" for label, count in (labels or {}).items()]
    return ", ".join(counts[:10]) + (" …" if len(counts) > 10 else "")


def _training(files) -> str:
    run, flags, world = files.run, files.run.get("flags") or {}, files.run.get("world") or {}
    names = [name for name in _TRAINING_FLAGS if flags.get("method") != "full" or not name.startswith("lora")]
    told = [(name.replace("_", " "), flags.get(name)) for name in names]
    told += [("precision", (run.get("identity") or {}).get("precision"))]
    told += [("processes", world.get("num_processes")), ("device", world.get("device"))]
    after = files.parameters.get("after") or {}
    if after:
        told.append(("trained weights", f"{after['trainable']:,} of {after['total']:,}"))
    told += [(name, version) for name, version in (run.get("versions") or {}).items()]
    told.append(("zerotune's commit", run.get("git_commit")))
    listed = ", ".join(f"{name} {value}" for name, value in told if value is not None)
    return f"## Training\n\n    {run.get('command', '')}\n\n{listed[:1].upper() + listed[1:]}."


def _limits(files, record: Mapping) -> str:
    """Return the limits of the model and of its scores, as known from the records."""
    lines = []
    if isinstance(files.tuned, Evaluation):
        metrics = files.tuned.metrics
        lines.append(
            f"The scores are for {metrics['count']:,} items of one test split. On texts of another kind, time or "
            "language they may be lower: evaluate it on yours."
        )
        cut = metrics.get("num_truncated")
        of_them = f" ({cut:,} of the test items were)" if cut else ""
        if record["head"] != "span":
            lines.append(f"Texts are cut to {record['max_length']:,} tokens{of_them}.")
    labels = record.get("labels")
    if labels and record["head"] == "classify":
        if record.get("thresholds"):  # any number of labels
            lines.append("It gives a text none, one or several of the labels above, and no other.")
        else:
            lines.append("It always answers with one of the labels above, even for a text that none of them fits.")
        lines.append("Its probabilities were not calibrated.")
    if record["head"] != "classify":
        lines.append("An answer may be wrong however fluent it reads: check it against the text.")
    lines.append("It has the biases of its base model and of the rows that it was trained on; no test looked for them.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
