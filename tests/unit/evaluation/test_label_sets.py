"""Evaluate texts with any number of labels by a head: decisions, files, and refused models and heads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings, run_settings, text_evaluation
from tiny_models import LABELS, move_weights, task_record, tiny_model
from transformers import pipeline

from zerotune.errors import Refused
from zerotune.evaluation.text import accuracy_line, check_evaluation, evaluate, evaluate_base
from zerotune.evaluation.validation import validate_label_sets
from zerotune.files import read_json, read_json_lines, write_json, write_json_lines
from zerotune.metrics.evaluations import paired_accuracy, read_evaluation
from zerotune.metrics.label_sets import label_set_metrics
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import save_final
from zerotune.models.multi_label import PROBLEM_TYPE, check_has_head, check_multi_label, is_multi_label
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import DataSettings, ModelSettings, TrainSettings
from zerotune.tasks.classify import task_of
from zerotune.tasks.splits import Example, Splits
from zerotune.training.classification import classifier_data
from zerotune.training.text import check_head
from zerotune.training.text import task_record as record_of_task

TASK = SimpleNamespace(name="topics", labels=LABELS, max_length=16, multi_label=True, wordings=((),), pair_columns=None)
TEXTS = ("the film was good", "a bad film", "not very good", "very dull", "bright", "the film was not bad")
SETS = ((0,), (0, 1), (), (1,), (), (0, 1))
EXAMPLES = [Example(f"test-{n}", text, labels) for n, (text, labels) in enumerate(zip(TEXTS, SETS, strict=True))]
NEVER = SimpleNamespace(raise_when_noted=lambda accelerator: None)
ALONE = SimpleNamespace(
    num_processes=1, process_index=0, device=torch.device("cpu"), deepspeed_plugin=None, wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a BERT tuned to give any number of labels, its tokenizer and its final/ folder."""
    folder, name = tmp_path_factory.mktemp("final"), tiny_model("bert")
    tokenizer = load_tokenizer(name, None)
    tuned = load_classifier(ModelSettings(name), LABELS, tokenizer)
    tuned.config.problem_type = PROBLEM_TYPE
    move_weights(tuned)
    with torch.no_grad():  # give the texts different labels
        tuned.stock_model.classifier.weight.mul_(6)
        tuned.stock_model.classifier.bias.zero_()
    save_final(tuned.eval(), tokenizer, folder, task_record(max_length=16, thresholds={"probability": 0.5}))
    return tuned, tokenizer, folder


def run(folder, final, examples=EXAMPLES, task=TASK):
    metrics = evaluate(folder, text_evaluation(str(final)), task, examples, ALONE, NEVER)
    return metrics, read_json_lines(folder / "predictions.jsonl")


def probabilities(model):
    tuned, tokenizer, _ = model
    with torch.no_grad():
        rows = (tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in TEXTS)
        return torch.cat([tuned(**row).sigmoid() for row in rows]).numpy()


def test_each_label_is_a_decision_by_itself(model, tmp_path):
    metrics, lines = run(tmp_path / "a", model[2])
    wanted = probabilities(model)
    np.testing.assert_allclose(np.exp([line["scores"] for line in lines]), wanted, atol=1e-5)
    assert [line["prediction"] for line in lines] == [np.flatnonzero(row > 0.5).tolist() for row in wanted]
    assert [line["label"] for line in lines] == [list(each) for each in SETS]
    assert len({tuple(line["prediction"]) for line in lines}) > 1
    right = [line["prediction"] == line["label"] for line in lines]
    assert metrics["exact_match"] == np.mean(right) and metrics["threshold"] == 0.5
    assert accuracy_line(metrics).startswith(f"exact match {metrics['exact_match']:.4f} [")


def test_pipeline_gives_the_same_probabilities(model):
    _tuned, _tokenizer, folder = model
    found = pipeline("text-classification", model=str(folder), top_k=None, device="cpu")(list(TEXTS))
    by_label = [[next(each["score"] for each in row if each["label"] == label) for label in LABELS] for row in found]
    np.testing.assert_allclose(by_label, probabilities(model), atol=1e-5)
    assert max(map(sum, by_label)) > 1.01 or min(map(sum, by_label)) < 0.99, "no softmax"
    assert is_multi_label(read_config(str(folder), None))


def test_the_threshold_is_task_jsons(model, tmp_path):
    tuned, tokenizer, _ = model
    found = probabilities(model)
    threshold = round(float(np.sort(found.ravel())[-4:-2].mean()), 6)  # three of twelve are above
    (tmp_path / "final").mkdir()
    save_final(tuned, tokenizer, tmp_path / "final", task_record(max_length=16, thresholds={"probability": threshold}))
    metrics, lines = run(tmp_path / "a", tmp_path / "final")
    assert metrics["threshold"] == threshold and (found > threshold).sum() in (2, 3) and (found > 0.5).sum() > 3
    assert [line["prediction"] for line in lines] == [np.flatnonzero(row > threshold).tolist() for row in found]


def test_unlabelled_items_get_predictions_and_no_submission(model, tmp_path):
    blind = [Example(example.id, example.text, None) for example in EXAMPLES]
    metrics, lines = run(tmp_path / "a", model[2], blind)
    assert metrics["count"] == 6 and "exact_match" not in metrics
    assert accuracy_line(metrics) == "6 predictions (the items have no labels)"
    assert {line["label"] for line in lines} == {None} and not (tmp_path / "a/submission.tsv").exists()


def test_a_paired_test_asks_whether_all_labels_are_right(model, tmp_path):
    run(tmp_path / "a", model[2])
    run(tmp_path / "b", model[2])
    lines = read_json_lines(tmp_path / "b/predictions.jsonl")
    for line in lines:
        line["prediction"] = line["label"]
    write_json_lines(tmp_path / "b/predictions.jsonl", lines)
    better = label_set_metrics(SETS, SETS, LABELS)
    write_json(tmp_path / "b/metrics.json", read_json(tmp_path / "b/metrics.json") | better)
    first, second = (read_evaluation(tmp_path / name) for name in ("a", "b"))
    pair = paired_accuracy(first, second)
    assert pair.accuracy_first == first.metrics["exact_match"] and pair.accuracy_second == 1
    assert pair.only_second == sum(line["prediction"] != line["label"] for line in first.predictions.values()) > 0


def test_validation_scores_the_same(model):
    tuned, tokenizer, _ = model
    data = classifier_data(TASK, tokenizer, tuned.config, EXAMPLES, 16, "head")
    engine = SimpleNamespace(accelerator=ALONE, forward=tuned)
    found, given = validate_label_sets(engine, data, 20, NEVER), probabilities(model)
    targets = np.array([[float(label in each) for label in (0, 1)] for each in SETS])
    losses = -(targets * np.log(given) + (1 - targets) * np.log(1 - given)).sum(axis=1)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-3)
    assert found["exact_match"] == np.mean(((given > 0.5) == targets).all(axis=1))
    assert list(found) == ["loss", "exact_match", "f1_micro", "f1_macro"]


# --- what is refused ---


def settings_of(folder, model="llama", head="classify", choose_by="f1_micro", multi_label=True):
    return TrainSettings(
        task="classify",
        head=head,
        model=ModelSettings(tiny_model(model) if model in ("llama", "bert") else str(model)),
        data=DataSettings(multi_label=multi_label),
        optimisation=optimisation_settings(choose_by=choose_by),
        run=run_settings(folder),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"head": "generate"},
            "--head generate writes one label, and --multi-label gives any number: use --head class",
        ),
        (
            {"choose_by": "accuracy"},
            "--choose-by accuracy is not measured with --multi-label: choose f1_micro or f1_ma",
        ),
        ({"choose_by": "exact_match", "multi_label": False}, "exact_match is not measured without --multi-label"),
    ],
)
def test_flags_of_a_run_that_do_not_fit(tmp_path, given, message):
    settings = settings_of(tmp_path, **given)
    with pytest.raises(Refused, match=message):
        check_head(settings, read_config(settings.model.name, None), load_tokenizer(settings.model.name, None))


def test_a_model_of_the_other_kind_is_refused_by_every_script(model, tmp_path):
    _tuned, tokenizer, folder = model
    single = SimpleNamespace(**vars(TASK) | {"multi_label": False})
    config = read_config(str(folder), None)
    with pytest.raises(
        Refused, match=r"gives a text any number of labels: train it with train/classify\.py --multi-label"
    ):
        check_evaluation(tmp_path, text_evaluation(str(folder)), single, EXAMPLES, config, tokenizer)
    with pytest.raises(Refused, match="gives a text any number of labels"):
        check_head(settings_of(tmp_path, folder, choose_by="accuracy", multi_label=False), config, tokenizer)
    (tmp_path / "final").mkdir()
    one = load_classifier(ModelSettings(tiny_model("bert")), LABELS, tokenizer)
    save_final(one, tokenizer, tmp_path / "final", task_record(max_length=16))
    own = ModelSettings(str(tmp_path / "final"))
    with pytest.raises(Refused, match=r"--multi-label: .* was trained to give a text exactly one label"):
        check_multi_label(own, read_config(own.name, None), True)
    (tmp_path / "final/task.json").unlink()  # like another tool's model, whose config does not say
    check_multi_label(own, read_config(own.name, None), True)
    raw = read_json(tmp_path / "final/config.json")
    write_json(tmp_path / "final/config.json", raw | {"problem_type": "single_label_classification"})
    with pytest.raises(Refused, match="exactly one label"):
        check_multi_label(own, read_config(own.name, None), True)


def test_a_causal_model_is_neither_asked_by_a_prompt_nor_evaluated_before_training(tmp_path, capsys):
    name = tiny_model("llama")
    with pytest.raises(Refused, match=r"needs a classifier head, and .* answers by a prompt, which gives one label"):
        check_has_head(name, read_config(name, None))
    splits = Splits([], [], EXAMPLES, {"sources": {"test": {"sha256": "abc"}}})
    evaluate_base(SimpleNamespace(path=tmp_path, accelerator=ALONE), settings_of(tmp_path), TASK, splits, NEVER)
    assert "base: not evaluated, because a prompt gives only one label" in capsys.readouterr().out
    assert not (tmp_path / "eval").exists()


def test_task_json_holds_the_threshold(tmp_path):
    assert record_of_task(settings_of(tmp_path), TASK, None)["thresholds"] == {"probability": 0.5}
    single = SimpleNamespace(**vars(TASK) | {"multi_label": False})
    assert record_of_task(settings_of(tmp_path), single, None)["thresholds"] is None


def test_task_json_holds_the_columns_of_a_pair(tmp_path):
    """It also holds columns that no flag names, for the README of final/."""
    for flags, columns in (
        ({"glue": "mrpc"}, ("sentence1", "sentence2")),
        ({"text_column": "a, b"}, ("a", "b")),
        ({"text_column": "a"}, None),
    ):
        task = task_of(DataSettings(**flags))
        assert record_of_task(settings_of(tmp_path), task, None)["pair_columns"] == columns
