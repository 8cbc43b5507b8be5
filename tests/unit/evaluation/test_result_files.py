"""The files that an evaluation on labelled texts writes."""

import json

from zerotune.evaluation.result_files import write_label_results, write_label_set_results
from zerotune.metrics.label_sets import PredictedLabelSets
from zerotune.metrics.labels import PredictedLabels
from zerotune.tasks.splits import Example

NAMES = ("negative", "positive")


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_labelled_items(tmp_path):
    examples = [Example("test-0", "good", 1), Example("test-1", "bad", 0)]
    predicted = PredictedLabels([1, None], {"answer": ["yes", "who knows"]}, written=True)
    metrics = write_label_results(tmp_path, examples, predicted, NAMES)
    first, second = lines(tmp_path)
    assert first == {
        "id": "test-0", "text": "good", "num_words": 1, "label": 1, "prediction": 1,
        "label_name": "positive", "prediction_name": "positive", "answer": "yes",
    }  # fmt: skip
    assert (second["prediction"], second["prediction_name"], second["label_name"]) == (None, None, "negative")
    assert (metrics["accuracy"], metrics["num_unparsable"], metrics["confusion"]) == (0.5, 1, [[0, 0, 1], [0, 1, 0]])
    assert not (tmp_path / "submission.tsv").exists()


def test_unlabelled_items_give_a_submission(tmp_path, capsys):
    examples = [Example("test-3", "good", None), Example("test-7", "bad", None)]
    assert write_label_results(tmp_path, examples, PredictedLabels([1, 0], {}), NAMES) == {"count": 2}
    assert (tmp_path / "submission.tsv").read_text() == "index\tprediction\n3\t1\n7\t0\n"
    assert [(line["label_name"], line["prediction_name"]) for line in lines(tmp_path)] == [
        (None, "positive"),
        (None, "negative"),
    ]
    (tmp_path / "submission.tsv").unlink()
    write_label_results(tmp_path, examples, PredictedLabels([1, None], {}, written=True), NAMES)
    assert not (tmp_path / "submission.tsv").exists() and "submission.tsv is not written" in capsys.readouterr().out


def test_a_submission_of_entailment_has_the_labels_names(tmp_path):
    """GLUE's server wants numbers, except for MNLI, QNLI and RTE."""
    examples = [Example("test-0", "one", None), Example("test-1", "two", None)]
    write_label_results(tmp_path, examples, PredictedLabels([1, 0], {}), ("entailment", "not_entailment"))
    assert (tmp_path / "submission.tsv").read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"


def test_a_files_own_index_goes_into_the_submission(tmp_path):
    examples = [Example("test-0", "good", None, "7"), Example("test-1", "bad", None, "3")]
    write_label_results(tmp_path, examples, PredictedLabels([1, 0], {}), NAMES)
    assert (tmp_path / "submission.tsv").read_text() == "index\tprediction\n7\t1\n3\t0\n"
    assert [line["id"] for line in lines(tmp_path)] == ["test-0", "test-1"]


def test_long_texts_are_cut_and_counted_whole(tmp_path):
    long = Example("test-0", "word " * 5_000, (1,))
    write_label_set_results(tmp_path, [long], PredictedLabelSets([(0, 1)], [[-0.1, -0.2]]), NAMES)
    (line,) = lines(tmp_path)
    assert len(line["text"]) == 1_002 and line["text"].endswith(" …") and line["num_words"] == 5_000
    assert (line["label_names"], line["prediction_names"]) == (["positive"], ["negative", "positive"])
