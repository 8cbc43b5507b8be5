"""Test a finished run's model card, completed from fabricated records and read by huggingface_hub's own parser."""

import json

import pytest
from huggingface_hub import ModelCard

from zerotune.metrics.evaluations import Evaluation
from zerotune.metrics.labels import classification_metrics
from zerotune.report.card import complete_card
from zerotune.report.curves import History
from zerotune.report.run_report import RunFiles
from zerotune.settings.names import DATASETS
from zerotune.squad.splits import CORPUS
from zerotune.tasks.imdb import IMDB
from zerotune.tasks.sst2 import SST2

LABELS = ("negative", "positive")
CARD = """---
base_model: org/base
library_name: transformers
---

# Classifier for texts

All weights of `org/base`. Trained with zerotune.

## License

None is given here.
"""


SPLIT = {
    "task": "sst2",
    "rule": "official",
    "split_seed": 0,
    "splits": {"train": {"count": 1_200, "labels": {"negative": 500, "positive": 700}, "ids_sha256": "ab" * 32}},
    "sources": {"train": {"dataset": "stanfordnlp/sst2", "rows": 67_349, "sha256": "12" * 32}},
    "notes": ["removed 31 train rows that are also in test"],
}
RUN = {
    "command": "train/sst2.py --model distilbert/distilbert-base-uncased --output-dir /home/ann/runs/a",
    "flags": {"method": "full", "seed": 0, "lora_rank": 8},
    "versions": {"python": "3.11.7"},
}
TUNED = classification_metrics([0, 1] * 50, [0, 1] * 40 + [1, 0] * 10, LABELS)
COMPARISON = "On the 100 items that both scored, accuracy went from 50 % to 80 %."


def completed(folder, **split):
    """Return the card of a fabricated run; completing it a second time must change nothing."""
    (folder / "final").mkdir(parents=True)
    path = folder / "final" / "README.md"
    path.write_text(CARD)
    record = {"head": "classify", "labels": list(LABELS), "max_length": 256, "base_model": "org/base"}
    path.with_name("task.json").write_text(json.dumps(record))
    tuned = Evaluation(folder, {**TUNED, "task": "sst2", "setting": "classifier head"}, {})
    files = RunFiles(
        folder, RUN, {}, SPLIT | split, History([], []), None, "no base evaluation", tuned, "no test", None
    )
    complete_card(files, COMPARISON)
    once = path.read_text()
    complete_card(files, COMPARISON)
    assert path.read_text() == once
    return ModelCard.load(path)


def test_the_model_index_has_the_scores_of_eval_final_with_their_intervals(tmp_path):
    sources = {
        "train": SPLIT["sources"]["train"],
        "test": {"dataset": "stanfordnlp/sst2", "split": "validation", "revision": "8d51e7e", "sha256": "34" * 32},
    }
    card = completed(tmp_path / "run", sources=sources)
    results = {result.metric_name.partition(" ")[0]: result for result in card.data.eval_results}
    accuracy = results["accuracy"]
    low, high = TUNED["accuracy_ci95"]
    assert accuracy.metric_value == TUNED["accuracy"]
    assert accuracy.metric_name == f"accuracy (95% interval {low:.4g} to {high:.4g})"
    assert (accuracy.dataset_type, accuracy.dataset_split, accuracy.dataset_revision) == (
        "stanfordnlp/sst2", "validation", "8d51e7e",
    )  # fmt: skip
    assert accuracy.task_type == "text-classification" and results["f1_macro"].metric_type == "f1"
    assert "accuracy_negative" not in results  # a single label's score
    assert card.data.metrics[0] == "accuracy" and "matthews_correlation" in card.data.metrics
    assert (card.data.datasets, card.data.language) == (["stanfordnlp/sst2"], "en")
    assert (card.data.base_model, card.data.library_name) == ("org/base", "transformers")  # unchanged


def test_the_sections_tell_scores_data_training_and_limits_before_the_license(tmp_path):
    text = completed(tmp_path / "run").text
    titles = ["# Classifier for texts", "## Scores", "## Data", "## Training", "## Limits", "## License"]
    assert [line for line in text.splitlines() if line.startswith("#")] == titles
    assert "| accuracy |" in text and COMPARISON in text
    assert "All weights of `org/base`. Trained with zerotune on SST-2.\n" in text
    assert f"`{'12' * 32}`" in text and "removed 31 train rows" in text
    assert "    train/sst2.py --model distilbert/distilbert-base-uncased --output-dir a\n" in text
    assert "Method full, seed 0, python 3.11.7." in text
    assert "Texts are cut to 256 tokens" in text and text.rstrip().endswith("None is given here.")


def test_own_files_claim_no_language_and_their_folders_stay_here(tmp_path):
    source = {"path": f"{tmp_path}/secret/tickets.csv", "sha256": "56" * 32}
    card = completed(tmp_path / "run", task="tickets", sources={"train": source})
    assert card.data.language is None and card.data.datasets is None
    assert {result.dataset_name for result in card.data.eval_results} == {"tickets.csv"}
    assert "Trained with zerotune on tickets.csv.\n" in card.text and "secret" not in card.text


OWN = {"dataset": "rajpurkar/squad_v2", "sha256": "78" * 32}
SAMPLE = {"sample": "zerotune.squad.sample.sample_articles", "seed": 1, "sha256": "9a" * 32}


@pytest.mark.parametrize(
    ("train", "test", "language", "named"),
    [
        (OWN, OWN, "en", "SQuAD v2"),
        (SAMPLE, SAMPLE, "en", "a made-up sample for SQuAD v2"),
        (OWN, OWN | {"dataset": "KorQuAD/squad_kor_v1"}, None, "SQuAD v2"),
        (OWN | {"dataset": "KorQuAD/squad_kor_v1"}, OWN, None, "squad_kor_v1"),
        ({"path": "/home/ann/my.json", "sha256": "bc" * 32}, OWN, None, "my.json"),
    ],
)
def test_the_task_s_name_and_language_are_those_of_its_own_data_only(train, test, language, named, tmp_path):
    card = completed(tmp_path / "run", task="squad", sources={"train": train, "test": test})
    assert card.data.language == language and f"Trained with zerotune on {named}.\n" in card.text


def test_the_data_sets_of_the_tasks_are_known():
    assert {one.name: one.dataset for one in (SST2, IMDB, CORPUS)} == DATASETS
