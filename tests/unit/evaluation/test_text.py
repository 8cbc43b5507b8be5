"""Evaluate labelled text by a head and by a prompt: the prompts, their description, and the files."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from default_settings import optimisation_settings, run_settings, text_evaluation
from tiny_models import character_model, task_record, tiny_model

from zerotune.errors import Refused
from zerotune.evaluation import by_prompt
from zerotune.evaluation.text import accuracy_line, evaluate, evaluate_base
from zerotune.files import read_json, read_json_lines
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator, load_language_model
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import DataSettings, ModelSettings, TrainSettings
from zerotune.tasks.prompts import Prompt
from zerotune.tasks.splits import Example, Splits, subset
from zerotune.tasks.texts import Wording
from zerotune.training.generation import encode_answers, prompt_record

TASK = SimpleNamespace(
    name="mood",
    labels=("negative", "positive"),
    max_length=40,
    multi_label=False,
    pair_names=None,
    pair_columns=None,
    wordings=(
        Wording("film {text} was", ("bad", "good")),
        Wording("{text}\nSo it was", ("dull", "very bright")),
    ),
)
TEXTS = ("the film was good", "a bad film", "not very good", "very dull", "bright", "the film was not bad")
EXAMPLES = [Example(f"test-{number}", text, number % 2) for number, text in enumerate(TEXTS)]
SHOTS = (Example("train-0", "very good", 1), Example("train-1", "very bad", 0))
NEVER = SimpleNamespace(raise_when_noted=lambda accelerator: None)
CPU = torch.device("cpu")
ALONE = SimpleNamespace(
    num_processes=1, process_index=0, device=CPU, deepspeed_plugin=None, wait_for_everyone=lambda: None
)


def run(folder, evaluation, examples=EXAMPLES, **more):
    metrics = evaluate(folder, evaluation, TASK, examples, ALONE, NEVER, **more)
    return metrics, read_json_lines(folder / "predictions.jsonl")


def log_probabilities(name, shots=(), text=None, wording=0):
    """Return the label words' log-probabilities after plain prompts, computed one whole string at a time."""
    model, tokenizer = load_language_model(ModelSettings(name), CPU), load_tokenizer(name, None)
    template, words, _ = TASK.wordings[wording]
    before = "".join(f"{template.format(text=shot.text)} {words[shot.label]}\n\n" for shot in shots)
    scores = []
    for word in words:
        prompt = tokenizer(before + template.format(text=text))["input_ids"]
        whole = tokenizer(f"{before}{template.format(text=text)} {word}")["input_ids"]
        with torch.no_grad():
            found = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(found[place - 1, whole[place]]) for place in range(len(prompt), len(whole))))
    return torch.tensor(scores).log_softmax(-1).tolist()


def test_an_encoder_answers_with_an_untrained_head_drawn_from_the_seed(tmp_path):
    evaluation = text_evaluation(tiny_model("bert"), text={"max_length": 4}, seed=5)
    metrics, lines = run(tmp_path / "a", evaluation)
    assert (metrics["setting"], metrics["head"], metrics["max_length"]) == ("untrained head", "classify", 4)
    assert metrics["num_truncated"] == 2 and metrics["shots"] == 0 and metrics["seed"] == 5
    for line, example in zip(lines, EXAMPLES, strict=True):
        assert (line["id"], line["label"]) == (example.id, example.label)
        assert line["prediction"] == int(np.argmax(line["scores"])) and sum(np.exp(line["scores"])) == pytest.approx(1)
    small, other = replace(evaluation, tokens_per_device=8), replace(evaluation.model, seed=1)
    np.testing.assert_allclose(scores(run(tmp_path / "b", small)[1]), scores(lines), atol=1e-6)
    assert np.abs(scores(run(tmp_path / "c", replace(evaluation, model=other))[1]) - scores(lines)).max() > 0.01


@pytest.mark.parametrize(("most_of_task", "max_length"), [(40, 40), (100, 64)])
def test_texts_are_cut_to_the_tasks_length_where_the_positions_reach(tmp_path, most_of_task, max_length):
    task = SimpleNamespace(**vars(TASK) | {"max_length": most_of_task})
    metrics = evaluate(tmp_path, text_evaluation(tiny_model("bert")), task, EXAMPLES, ALONE, NEVER)
    assert metrics["max_length"] == max_length


def scores(lines):
    return np.array([line["scores"] for line in lines])


@pytest.mark.parametrize("shots", [(), SHOTS])
@pytest.mark.parametrize("wording", [0, 1])
def test_a_causal_model_answers_by_the_likelihood_of_its_label_words(tmp_path, shots, wording):
    character_model(tmp_path / "m")  # each word has several tokens
    metrics, lines = run(tmp_path / "out", text_evaluation(str(tmp_path / "m"), shots=shots, wording=wording))
    wanted = [log_probabilities(str(tmp_path / "m"), shots, text, wording) for text in TEXTS]
    np.testing.assert_allclose(scores(lines), wanted, atol=2e-4)
    assert metrics["setting"] == ("2-shot prompt" if shots else "zero-shot prompt")
    assert metrics["shot_ids"] == [shot.id for shot in shots] and metrics["shots"] == len(shots)
    assert (metrics["prompt"], tuple(metrics["label_words"])) == TASK.wordings[wording][:2]
    assert metrics["head"] == "prompt" and metrics["max_length"] == 40 and metrics["num_truncated"] == 0


@pytest.mark.parametrize("columns", [None, ("a", "b")])
def test_calibration_is_by_content_free_texts(tmp_path, columns):
    """Zhao et al. 2021: divide by the mean probability after "N/A", "[MASK]" and an empty text, or pairs of these."""
    name, given = str(tmp_path / "m"), {"calibrate": "contextual"}
    character_model(tmp_path / "m")
    task = SimpleNamespace(**vars(TASK) | {"pair_columns": columns})
    metrics = evaluate(tmp_path / "out", text_evaluation(name, prompt=given), task, EXAMPLES, ALONE, NEVER)
    lines = read_json_lines(tmp_path / "out" / "predictions.jsonl")
    plain = np.exp([log_probabilities(name, text=text) for text in TEXTS])
    free = [f"a: {text}\nb: {text}" if columns else text for text in ("N/A", "[MASK]", "")]
    free = np.exp([log_probabilities(name, text=text) for text in free]).mean(axis=0)
    wanted = plain / free
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(scores(lines)), wanted, atol=1e-4)
    labels = [example.label for example in EXAMPLES]
    assert metrics["uncalibrated_accuracy"] == np.mean(plain.argmax(axis=1) == labels)
    assert metrics["accuracy"] == np.mean(wanted.argmax(axis=1) == labels)


def test_a_causal_model_may_write_its_answer(tmp_path, monkeypatch):
    evaluation = text_evaluation(tiny_model("llama"), prompt={"answer_by": "generation"}, shots=SHOTS)
    metrics, lines = run(tmp_path / "out", evaluation)
    monkeypatch.setattr("zerotune.evaluation.by_prompt.can_share", lambda *_: False)  # uses transformers' generate
    assert run(tmp_path / "whole prompts", evaluation)[1] == lines and len({line["answer"] for line in lines}) > 1
    labels = {"bad": 0, "good": 1}
    for line in lines:
        first = (line["answer"].split() or [""])[0]
        assert line["prediction"] == labels.get(first) and "scores" not in line
    assert metrics["num_unparsable"] == sum(line["prediction"] is None for line in lines)


def test_a_prompt_cut_as_a_generators_leaves_room_for_the_answers_end(tmp_path):
    """Its rows are the rows of training, where text, prompt and answer together have at most max_length tokens."""
    name = tiny_model("llama")
    tokenizer = load_tokenizer(name, None)
    as_prompt, as_generator = (
        run(tmp_path / str(each), text_evaluation(name, text={"max_length": 9}, as_generator=each))[0]
        for each in (False, True)
    )
    trained = encode_answers(tokenizer, Prompt(*TASK.wordings[0][:2]), EXAMPLES, 9, 64)
    assert as_generator["num_truncated"] == trained.num_truncated > as_prompt["num_truncated"] == 0


def test_a_tuned_generator_is_asked_as_it_was_trained(tmp_path):
    name, prompt = tiny_model("llama"), Prompt(*TASK.wordings[1][:2])
    tokenizer = load_tokenizer(name, None)
    model = load_generator(ModelSettings(name), tokenizer).eval()
    record = task_record("generate", task="mood", labels=list(TASK.labels), max_length=11, seed=6)
    save_final(model, tokenizer, tmp_path, record | {"prompt": prompt_record(prompt), "training_sha256": "x"})
    metrics, lines = run(tmp_path / "out", text_evaluation(str(tmp_path)))
    data = encode_answers(tokenizer, prompt, EXAMPLES, 11, 64)
    with torch.no_grad():
        wanted = data.log_probabilities(data.scores(model, np.arange(len(EXAMPLES)), CPU))
    np.testing.assert_allclose(scores(lines), wanted, atol=1e-5)
    assert (metrics["setting"], metrics["head"], metrics["method"]) == ("tuned generator", "generate", "full")
    assert (metrics["seed"], metrics["max_length"], metrics["num_truncated"]) == (6, 11, data.num_truncated)
    other = SimpleNamespace(**vars(TASK) | {"labels": ("no", "yes")})
    with pytest.raises(
        Refused, match=r"the model's labels must be the task's, 'no', 'yes': .* was tuned for 'negative'"
    ):
        evaluate(tmp_path / "other", text_evaluation(str(tmp_path)), other, EXAMPLES, ALONE, NEVER)


def test_unlabelled_items_give_predictions_and_no_metrics(tmp_path):
    blind = [Example(example.id, example.text, None) for example in EXAMPLES]
    metrics, lines = run(tmp_path / "out", text_evaluation(tiny_model("llama")), blind)
    assert metrics["count"] == 6 and "accuracy" not in metrics
    assert accuracy_line(metrics) == "6 predictions (the items have no labels)"
    rows = (tmp_path / "out" / "submission.tsv").read_text().splitlines()
    assert rows[1:] == [f"{number}\t{line['prediction']}" for number, line in enumerate(lines)]


def test_several_evaluations_share_a_model_and_its_tokenizer(tmp_path, monkeypatch):
    loads = []

    def load(*args):
        loads.append(args)
        return load_language_model(*args)

    monkeypatch.setattr(by_prompt, "load_language_model", load)
    shared = by_prompt.SharedModel(load_tokenizer(tiny_model("llama"), None))
    monkeypatch.setattr("zerotune.evaluation.text.load_tokenizer", None)
    for wording in (0, 1):
        evaluation = text_evaluation(tiny_model("llama"), wording=wording, seed=wording)
        run(tmp_path / f"seed-{wording}", evaluation, shared=shared)
    assert len(loads) == 1


# --- before and after training ---


class Run(SimpleNamespace):
    """A run folder that times nothing."""

    def timed(self, name):
        assert name == "base_eval_s"
        return nullcontext()


def training(folder, base_eval="full", **model):
    return TrainSettings(
        task="mood",
        head="classify",
        model=ModelSettings(tiny_model("llama"), **model),
        data=DataSettings(),
        optimisation=optimisation_settings(seed=4, tokens_per_device=64),
        run=run_settings(folder, base_eval=base_eval),
    )


@pytest.fixture
def run_folder(tmp_path):
    return Run(path=tmp_path, accelerator=ALONE)


SPLITS = Splits([], [], EXAMPLES, {"sources": {"test": {"sha256": "abc"}}})


def test_the_base_evaluation_asks_the_model_as_it_is(run_folder, tmp_path, capsys):
    evaluate_base(run_folder, training(tmp_path, method="lora"), TASK, SPLITS, NEVER)
    metrics = read_json(tmp_path / "eval/base/metrics.json")
    assert (metrics["setting"], metrics["seed"], metrics["data_sha256"]) == ("zero-shot prompt", 4, "abc")
    assert metrics["count"] == 6 and not metrics["load_4bit"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"base (zero-shot prompt): {accuracy_line(metrics)}"
    evaluate_base(run_folder, training(tmp_path, method="lora"), TASK, SPLITS, NEVER)
    already = f"{tmp_path / 'eval/base'} holds these scores already: nothing is evaluated again"
    assert capsys.readouterr().out.splitlines() == [already, said]


def test_a_base_that_was_tuned_for_other_labels_is_not_asked(run_folder, tmp_path, monkeypatch, capsys):
    record = {"head": "generate", "labels": ["art", "maths"]}
    monkeypatch.setattr("zerotune.evaluation.text.generator_record", lambda model: record)
    evaluate_base(run_folder, training(tmp_path), TASK, SPLITS, NEVER)
    assert "base: not evaluated, because it was tuned for other labels, 'art', 'maths'" in capsys.readouterr().out
    assert not (tmp_path / "eval").exists()


def test_it_takes_a_fixed_subset_or_none(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("zerotune.evaluation.text.BASE_EVAL_ITEMS", 4)
    evaluate_base(run_folder, training(tmp_path, "none"), TASK, SPLITS, NEVER)
    assert not (tmp_path / "eval").exists()
    evaluate_base(run_folder, training(tmp_path, "subset"), TASK, SPLITS, NEVER)
    lines = read_json_lines(tmp_path / "eval/base/predictions.jsonl")
    assert len(lines) == 4 and sorted(line["label"] for line in lines) == [0, 0, 1, 1]
    limited = subset(DataSettings(limit_eval=4), "test", EXAMPLES)
    assert [line["id"] for line in lines] == [example.id for example in limited]  # base and final share their items
