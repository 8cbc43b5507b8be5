"""Run eval/sst2.py as a process: compare its scores with the run's own numbers and with the slow way."""

import json
import shutil
import signal

import numpy as np
import pytest
from brute_force import WORDS, BruteForce
from launching import FEW_TOKENS
from test_curves import REFERENCES
from tiny_models import CHAT_TEMPLATE, character_model, tiny_model
from waiting import wait_until

from zerotune.files import json_sha256, read_json_lines
from zerotune.tasks.prompts import draw_shots
from zerotune.tasks.splits import Example

# float32 in a padded batch against a single row: measured 2e-6.
SAME_SCORE = 2e-5


def results(folder):
    """Return an evaluation folder's scores by id, and its metrics."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        assert np.exp(line["scores"]).sum() == pytest.approx(1, abs=1e-5)
        assert line["prediction"] == int(np.argmax(line["scores"]))
    return {line["id"]: line["scores"] for line in lines}, json.loads((folder / "metrics.json").read_text())


def texts_of(path, limit=None):
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(row[0], int(row[1])) for row in rows][:limit]


@pytest.fixture(scope="module")
def characters(workplace):
    """Make a model whose label words have eight tokens each, and compute likelihoods with it the slow way."""
    folder = workplace.folder / "characters"
    character_model(folder)
    return folder, BruteForce(folder)


@pytest.fixture(scope="module")
def few(workplace):
    """Write a test file of 24 rows."""
    path = workplace.folder / "few.tsv"
    path.write_text("".join(workplace.test_file.read_text().splitlines(keepends=True)[:25]))
    return path


# --- a tuned folder ---


@pytest.mark.slow
@pytest.mark.parametrize("method", REFERENCES)
def test_a_final_folder_scores_as_its_run_said(workplace, method):
    run = workplace.train_once(method, *REFERENCES[method])
    final = run.folder / "final"
    done = workplace.evaluate(f"eval-{method}", "--model", final, "--tokens-per-device", FEW_TOKENS)
    assert (done.folder / "predictions.jsonl").read_text() == (run.folder / "eval/final/predictions.jsonl").read_text()
    ours, theirs = done.read_json("metrics.json"), run.read_json("eval/final/metrics.json")
    assert ours == theirs and ours["count"] == 48 and ours["setting"] == "classifier head"
    other, _ = results(workplace.evaluate(f"eval-{method}-4096", "--model", final, "--tokens-per-device", 4096).folder)
    scores, _ = results(done.folder)
    assert list(other) == list(scores)
    np.testing.assert_allclose(list(other.values()), list(scores.values()), atol=SAME_SCORE)


def test_two_processes_score_each_id_once(workplace):
    final = workplace.train_once("full").folder / "final"
    flags = ["--model", final, "--test-file", workplace.test_file, "--tokens-per-device", FEW_TOKENS]
    one, two = workplace.evaluate("eval-one", *flags), workplace.evaluate("eval-two", *flags, world=2)
    assert len(results(one.folder)[0]) == 120
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one.folder / name).read_text() == (two.folder / name).read_text()
    assert not (two.folder / ".partial").exists()


def test_prompt_flags_mean_nothing_to_a_classifier_head(workplace):
    final = workplace.train_once("full").folder / "final"
    refused = workplace.evaluate("eval-shots", "--model", final, "--shots", 2, "--calibrate", "contextual", expect=2)
    assert "--shots, --calibrate" in refused.refusal() and not refused.folder.exists()


def test_an_encoder_without_a_head_is_labelled_as_untrained(workplace, few):
    done = workplace.evaluate("eval-encoder", "--model", tiny_model("bert"), "--test-file", few, "--max-length", 60)
    assert results(done.folder)[1]["setting"] == "untrained head"


# --- the prompt ---


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("calibrate", ["none", "contextual"])
@pytest.mark.parametrize("kind", ["one token", "several tokens"])
def test_label_likelihoods_are_those_of_the_slow_way(workplace, characters, few, kind, shots, calibrate):
    folder, slow = (workplace.model, BruteForce(workplace.model)) if kind == "one token" else characters
    assert (len(slow.tokenizer(" positive", add_special_tokens=False)["input_ids"]) == 1) == (kind == "one token")
    flags = ["--model", folder, "--test-file", few, "--train-file", workplace.train_file]
    flags += ["--shots", shots, "--calibrate", calibrate, "--tokens-per-device", 3000, "--seed", 5]
    done = workplace.evaluate(f"eval-prompt-{kind[:3]}-{shots}-{calibrate}", *flags)
    scores, metrics = results(done.folder)
    assert (metrics["num_truncated"], metrics["shots"], metrics["prompt_format"]) == (0, shots, "plain")
    held_out = {text for text, _ in texts_of(few)}
    train = [Example(text, text, label) for text, label in texts_of(workplace.train_file) if text not in held_out]
    drawn = [(shot.text, shot.label) for shot in draw_shots(train, shots, ("negative", "positive"), 5)]
    wanted = [slow.scores(text, drawn, calibrate == "contextual") for text, _ in texts_of(few)]
    np.testing.assert_allclose(list(scores.values()), wanted, atol=SAME_SCORE)
    assert len(wanted) == 24 and np.ptp(np.array(wanted)[:, 0]) > 1e-3  # the text changes the score


def test_a_chat_prompt_has_a_pinned_date_and_one_bos(workplace, few):
    folder = workplace.folder / "characters-instruct"
    character_model(folder, CHAT_TEMPLATE)
    slow = BruteForce(folder)
    done = workplace.evaluate("eval-chat", "--model", folder, "--test-file", few)
    scores, metrics = results(done.folder)
    assert metrics["prompt_format"] == "chat"
    prompts = [f"<s>26 Jul 2024\n[user]Review: {text}\nSentiment:\n[assistant]" for text, _ in texts_of(few)]
    assert slow.tokenizer(prompts[0], add_special_tokens=False)["input_ids"].count(slow.tokenizer.bos_token_id) == 1
    likelihoods = [slow.likelihoods(prompt, list(WORDS), add_special_tokens=False) for prompt in prompts]
    wanted = [one.log_softmax(-1).tolist() for one in likelihoods]
    np.testing.assert_allclose(list(scores.values()), wanted, atol=SAME_SCORE)
    plain = workplace.evaluate("eval-plain", "--model", folder, "--test-file", few, "--prompt-format", "plain")
    wanted = [slow.scores(text) for text, _ in texts_of(few)]
    np.testing.assert_allclose(list(results(plain.folder)[0].values()), wanted, atol=SAME_SCORE)


def test_a_model_in_4_bits_scores_nearly_the_same(workplace, few):
    flags = ["--model", workplace.model, "--test-file", few]
    whole, _ = results(workplace.evaluate("eval-32bit", *flags).folder)
    packed, metrics = results(workplace.evaluate("eval-4bit", *flags, "--load-4bit").folder)
    difference = np.abs(np.array(list(whole.values())) - np.array(list(packed.values())))
    # NF4 has 16 levels: a weight's error is a few percent of its block's largest weight.
    assert metrics["load_4bit"] and 0 < difference.max() < 0.2


def test_a_chat_prompt_needs_a_template(workplace, few):
    flags = ["--model", workplace.model, "--test-file", few, "--prompt-format", "chat"]
    assert "has no chat template" in workplace.evaluate("eval-no-template", *flags, expect=2).refusal()


def test_too_many_shots_are_refused_before_a_weight_is_loaded(workplace, characters, few):
    flags = ["--model", characters[0], "--test-file", few, "--train-file", workplace.train_file, "--shots", 40]
    refused = workplace.evaluate("eval-many-shots", *flags, expect=2)
    assert "the model's window is 2048: use fewer --shots" in refused.refusal()


# --- resuming, and not mixing ---


def killed_after_some_batches(workplace, name, flags):
    folder = workplace.folder / name
    job = workplace.server.start("eval/sst2.py", [*flags, "--output-dir", folder], folder)
    partial = folder / ".partial" / "rank-0.jsonl"
    wait_until(lambda: len(read_json_lines(partial)) >= 6, "six answers are written", pause=0.001)
    job.kill(signal.SIGKILL)
    assert job.wait().codes == (-9,)
    assert not (folder / "metrics.json").exists()
    return partial


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(workplace, characters, world):
    flags = ["--model", characters[0], "--test-file", workplace.test_file, "--tokens-per-device", 1]
    flags += ["--precision", "fp32"]
    reference = workplace.evaluate("eval-uninterrupted", *flags)
    name = f"eval-interrupted-{world}"
    partial = killed_after_some_batches(workplace, name, flags)
    done = workplace.evaluate(name, *flags, world=world)
    for file in ("predictions.jsonl", "metrics.json"):
        assert (done.folder / file).read_text() == (reference.folder / file).read_text()
    assert not partial.parent.exists()


def test_what_was_scored_is_not_scored_again(workplace, characters):
    flags = ["--model", characters[0], "--test-file", workplace.test_file, "--tokens-per-device", 1]
    flags += ["--precision", "fp32"]
    partial = killed_after_some_batches(workplace, "eval-marked", flags)
    lines = partial.read_text().splitlines(keepends=True)
    row = json.loads(lines[1])
    mark = np.log([[0.25, 0.75]]).astype(np.float32).tolist()
    row |= {"records": [{"log_probabilities": mark[0]}]}
    row["sha256"] = json_sha256([row["batch"], row["records"]])
    partial.write_text(lines[0] + json.dumps(row) + "\n" + "".join(lines[2:]))
    done = workplace.evaluate("eval-marked", *flags)
    assert mark[0] in results(done.folder)[0].values()


def test_the_same_evaluation_again_is_not_done_again(workplace, few):
    flags = ["--model", workplace.model, "--test-file", few]
    folder = workplace.evaluate("eval-again", *flags).folder
    before = (folder / "predictions.jsonl").stat().st_mtime_ns
    assert "accuracy" in workplace.evaluate("eval-again", *flags).text()
    assert (folder / "predictions.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [["--shots", 2], ["--limit-eval", 10], ["--calibrate", "contextual"]])
def test_other_settings_in_the_same_folder_are_refused(workplace, few, change):
    flags = ["--model", workplace.model, "--test-file", few, "--train-file", workplace.train_file]
    folder = workplace.evaluate("eval-settings", *flags).folder
    before = (folder / "metrics.json").read_text()
    refused = workplace.evaluate("eval-settings", *flags, *change, expect=2)
    assert change[0] in refused.refusal() and "--output-dir" in refused.refusal()
    assert (folder / "metrics.json").read_text() == before


def test_other_items_under_the_same_name_are_refused(workplace, few):
    path = workplace.folder / "changing.tsv"
    shutil.copy(few, path)
    flags = ["--model", workplace.model, "--test-file", path]
    folder = workplace.evaluate("eval-items", *flags).folder
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    refusal = workplace.evaluate("eval-items", *flags, expect=2).refusal()
    assert "holds an evaluation that differs in data sha256, items: choose another --output-dir" in refusal
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_refused_evaluation_may_follow_the_cure(workplace, characters, few):
    flags = ["--model", characters[0], "--test-file", few, "--train-file", workplace.train_file]
    assert "use fewer --shots" in workplace.evaluate("eval-cured", *flags, "--shots", 40, expect=2).refusal()
    workplace.evaluate("eval-cured", *flags, "--shots", 1)


def test_rows_that_the_model_was_tuned_on_are_told(workplace):
    run = workplace.train_once("full")
    done = workplace.evaluate("eval-seen", "--model", run.folder / "final", "--test-file", workplace.train_file)
    assert "trained on rows of this file or split, so this is not a score on unseen items" in done.text()
    assert "tuned on rows" not in workplace.evaluate("eval-its-own", "--model", run.folder / "final").text()


# --- without labels ---


def test_unlabelled_rows_give_predictions_and_no_metrics(workplace):
    path = workplace.folder / "unlabelled.tsv"
    path.write_text("sentence\n" + "".join(f"{text}\n" for text, _ in texts_of(workplace.test_file, 30)))
    final = workplace.train_once("full").folder / "final"
    done = workplace.evaluate("eval-unlabelled", "--model", final, "--test-file", path)
    lines = done.read_lines("predictions.jsonl")
    assert len(lines) == 30 and {line["label"] for line in lines} == {None}
    metrics = done.read_json("metrics.json")
    assert metrics["count"] == 30 and "accuracy" not in metrics
    header, *rows = (done.folder / "submission.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert rows == [f"{index}\t{line['prediction']}" for index, line in enumerate(lines)]
    assert "30 predictions" in done.text()
    some = workplace.evaluate("eval-some", "--model", final, "--test-file", path, "--limit-eval", 5)
    rows = [line.split("\t")[0] for line in (some.folder / "submission.tsv").read_text().splitlines()[1:]]
    assert [f"test-{row}" for row in rows] == [line["id"] for line in some.read_lines("predictions.jsonl")]
    assert rows != ["0", "1", "2", "3", "4"]
