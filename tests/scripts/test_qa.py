"""Run train/qa.py and eval/qa.py as processes: a span head learns, is reloaded from final/, and scored officially."""

import json

import numpy as np
import pytest
from launching import FEW_TOKENS

from zerotune.files import read_json_lines
from zerotune.squad.files import read_questions
from zerotune.squad.metrics import official_scores, score_answers
from zerotune.squad.sample import sample_articles

# float32 in differently padded batches; logits sum over more terms than a classifier's.
SAME_SCORE = 5e-4


@pytest.fixture(scope="module")
def qa(workplace):
    """Start the two scripts on sample questions; keep a finished training run."""
    files = {}
    for name, num_questions, seed in (("train", 320, 1), ("test", 60, 2)):
        files[name] = workplace.folder / f"{name}-questions.json"
        files[name].write_text(json.dumps(sample_articles(num_questions, seed)))

    def run(script, name, *flags, world=1, expect=0, **disturbance):
        more = ["--precision", "fp32", "--tokens-per-device", 8 * FEW_TOKENS, "--output-dir", workplace.folder / name]
        folder = workplace.folder / name
        ended = workplace.server.start(script, [*more, *flags], folder, world=world, **disturbance).wait()
        assert set(ended.codes) == {expect}, f"{ended.codes}\n{ended.text()}"
        return ended

    def train(name, *flags, **options):
        data = ("--train-file", files["train"], "--test-file", files["test"], "--model", workplace.model)
        few = ("--max-steps", 8, "--batch-size", 16, "--log-every", 1, "--learning-rate", 1e-3, "--max-length", 160)
        stride = () if flags[:2] == GENERATE[:2] else ("--doc-stride", 16)
        return run("train/qa.py", name, *data, *stride, *few, *flags, **options)

    def train_once(name, *flags, **options):
        if f"qa/{name}" not in workplace.finished:
            workplace.finished[f"qa/{name}"] = train(name, *flags, **options)
        return workplace.finished[f"qa/{name}"]

    def evaluate(name, *flags, **options):
        return run("eval/qa.py", name, *flags, **options)

    return train_once, train, evaluate, files


def answers(launch, folder="."):
    lines = read_json_lines(launch.folder / folder / "predictions.jsonl")
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_a_run_leaves_what_was_promised(qa):
    train_once, _, _, files = qa
    run = train_once("qa")
    questions, _ = read_questions(files["test"])
    predictions = run.read_json("eval/final/predictions.json")
    assert list(predictions) == [question.id for question in questions]
    metrics, official = run.read_json("eval/final/metrics.json"), official_scores(score_answers(questions, predictions))
    assert {name: metrics[name] for name in official} == official
    assert metrics["best_f1"] >= metrics["f1"] - 1e-9 and metrics["setting"] == "span head"
    task = run.read_json("final/task.json")
    line = [row for row in run.read_lines("metrics.jsonl") if row["step"] == task["best_step"] and "eval_f1" in row][-1]
    assert (
        task["thresholds"] == {"null_odds": line["eval_threshold"]} and metrics["threshold"] == line["eval_threshold"]
    )
    assert (task["head"], task["max_length"], task["doc_stride"]) == ("span", 160, 16)
    for found in answers(run, "eval/final").values():
        abstains = found["null_odds"] > metrics["threshold"]
        assert found["prediction"] == ("" if abstains else found["n_best"][0]["text"])
        assert [span["score"] for span in found["n_best"]] == sorted(
            (s["score"] for s in found["n_best"]), reverse=True
        )
    validation, test = (run.read_json("split.json")["splits"][name] for name in ("validation", "test"))
    assert validation["count"] > 0 and test["count"] == 60
    report = (run.folder / "report.html").read_text()
    for said in ("By question word", "HasAns F1", "an oracle and not a result", "BLEU", "Errors and right answers"):
        assert said in report, said
    assert "answering no question" in run.text()
    assert run.read_json("eval/base/metrics.json")["setting"] == "zero-shot prompt"
    assert run.read_json("state.json")["state"] == "finished"


@pytest.mark.parametrize("world", [1, 2])
def test_a_final_folder_scores_as_its_run_said(qa, world):
    train_once, _, evaluate, _ = qa
    run = train_once("qa")
    done = evaluate(f"qa-eval-{world}", "--model", run.folder / "final", world=world)
    for name in ("predictions.jsonl", "predictions.json", "breakdown.json"):
        assert (done.folder / name).read_text() == (run.folder / "eval/final" / name).read_text()
    ours, theirs = done.read_json("metrics.json"), run.read_json("eval/final/metrics.json")
    assert ours == theirs
    other = evaluate(f"qa-eval-long-{world}", "--model", run.folder / "final", "--tokens-per-device", 4000, world=world)
    odds = [[line["null_odds"] for line in answers(each).values()] for each in (done, other)]
    np.testing.assert_allclose(*odds, atol=SAME_SCORE)


@pytest.mark.slow
def test_two_processes_train_as_one(qa):
    train_once, _, _, _ = qa
    one, two = train_once("qa"), train_once("qa-two", world=2)
    losses = [[row["loss"] for row in each.read_lines("metrics.jsonl") if "loss" in row] for each in (one, two)]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(qa):
    train_once, _, evaluate, _ = qa
    final = train_once("qa").folder / "final"
    whole = evaluate("qa-whole", "--model", final)
    died = {"event": "open", "path": r"breakdown\.json", "do": "SIGKILL"}
    stopped = evaluate("qa-killed", "--model", final, expect=-9, on_event=died)
    kept = read_json_lines(stopped.folder / ".partial" / "rank-0.jsonl")
    assert len(kept) > 2
    again = evaluate("qa-killed", "--model", final)
    assert (again.folder / "predictions.jsonl").read_text() == (whole.folder / "predictions.jsonl").read_text()
    assert not (again.folder / ".partial").exists()


GENERATE = ("--head", "generate", "--max-length", 256, "--max-new-tokens", 6, "--base-eval", "full")


def test_a_generator_is_trained_and_comes_back(qa):
    train_once, train, evaluate, _ = qa
    run = train_once("qa-generate", *GENERATE)
    metrics, task = run.read_json("eval/final/metrics.json"), run.read_json("final/task.json")
    assert (metrics["setting"], metrics["head"]) == ("tuned generator", "generate")
    assert 0 <= metrics["eos_rate"] <= 1 and "best_f1" not in metrics and metrics["shares_paragraphs"]
    assert (task["max_length"], task["max_new_tokens"], task["prompt"]["no_answer"]) == (256, 6, "unanswerable")
    base = run.read_json("eval/base/metrics.json")
    assert base["setting"] == "zero-shot prompt" and base["count"] == metrics["count"] == 60
    losses = [row["loss"] for row in run.read_lines("metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 1  # a random model starts at ln 2048
    report = (run.folder / "report.html").read_text()
    assert "answers that the model ended" in report and "an oracle" not in report and "Newcombe" in report
    done = evaluate("qa-generate-eval", "--model", run.folder / "final", world=2)
    for name in ("predictions.jsonl", "predictions.json"):
        assert (done.folder / name).read_text() == (run.folder / "eval/final" / name).read_text()
    assert done.read_json("metrics.json") == metrics
    again = train("qa-generate", *GENERATE)
    assert f"{run.folder} is finished; the report is" in again.text()


def test_a_causal_model_is_asked_by_a_prompt_with_shots(qa, workplace):
    _, _, evaluate, files = qa
    flags = ("--model", workplace.model, "--test-file", files["test"], "--max-new-tokens", 4, "--limit-eval", 12)
    asked = evaluate("qa-shots", *flags, "--shots", 2, "--train-file", files["train"])
    metrics = asked.read_json("metrics.json")
    assert metrics["setting"] == "2-shot prompt" and len(metrics["shot_ids"]) == 2 and metrics["count"] == 12
    train_ids = {question.id for question in read_questions(files["train"])[0]}
    assert set(metrics["shot_ids"]) <= train_ids
    zero = evaluate("qa-no-shots", *flags)
    assert zero.read_json("metrics.json")["setting"] == "zero-shot prompt"


def test_flags_choose_other_questions_and_unanswered_ones_are_predicted(qa, workplace):
    train_once, _, evaluate, files = qa
    final = train_once("qa").folder / "final"
    fewer = evaluate("qa-fewer", "--model", final, "--limit-eval", 10, "--n-best", 2)
    assert len(answers(fewer)) == 10 and all(len(each["n_best"]) <= 2 for each in answers(fewer).values())
    value = json.loads(files["test"].read_text())
    for article in value["data"]:
        for block in article["paragraphs"]:
            block["qas"] = [{"id": qa["id"], "question": qa["question"]} for qa in block["qas"]]
    blind = workplace.folder / "blind.json"
    blind.write_text(json.dumps(value))
    predicted = evaluate("qa-blind", "--model", final, "--test-file", blind)
    whole = train_once("qa").read_json("eval/final/predictions.json")
    assert predicted.read_json("predictions.json") == whole
    assert "exact" not in predicted.read_json("metrics.json") and "60 predictions" in predicted.text()


def test_runs_are_compared(qa, workplace):
    train_once, _, _, _ = qa
    first, second = train_once("qa"), train_once("qa-seed-1", "--seed", 1)
    folders = [each.folder / "eval" / "final" for each in (first, second)]
    done = workplace.server.start(
        "eval/compare.py", [*folders, "--output-dir", workplace.folder / "qa-both"], workplace.folder / "qa-both"
    ).wait()
    assert done.codes == (0,), done.text()
    record = done.read_json("comparison.json")
    (pair,) = record["paired"]
    metrics = [each["metrics"] for each in record["evaluations"]]
    assert pair["num_common"] == 60
    assert 100 * pair["difference"] == pytest.approx(metrics[1]["exact"] - metrics[0]["exact"])
    assert 100 * pair["f1"]["difference"] == pytest.approx(metrics[1]["f1"] - metrics[0]["f1"])
    low, high = pair["f1"]["difference_ci95"]
    assert low <= pair["f1"]["difference"] <= high and 0 < pair["f1"]["p_value"] <= 1
    (spread,) = record["seeds"]
    assert spread["f1"]["mean"] == pytest.approx((metrics[0]["f1"] + metrics[1]["f1"]) / 200)
    page = (done.folder / "report.html").read_text()
    assert "HasAns exact" in page and "randomisation test" in page


@pytest.mark.parametrize("head", ["span", "generate"])
def test_a_plan_is_printed_and_nothing_written(qa, head):
    _, train, _, _ = qa
    run = train("qa-plan", "--head", head, "--plan")
    assert "8 of 16 rows on 1 device(s)" in run.text() and "data: 3" in run.text() and not run.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("qa", ()), ("qa-generate", GENERATE)])
def test_label_smoothing_is_in_the_training_loss(qa, name, head):
    """tests/unit/squad/test_spans.py checks its arithmetic against torch's."""
    train_once, train, _, _ = qa
    smoothed = train(f"{name}-smoothed", *head, "--base-eval", "none", "--max-steps", 1, "--label-smoothing", 0.9)
    first = [run.read_lines("metrics.jsonl")[0]["loss"] for run in (train_once(name, *head), smoothed)]
    # for a random model both are about the logarithm of the number of classes
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-length", 600), "--max-length 600 is more than the model's 512 positions"),
        (("--max-length", 40, "--doc-stride", 39), "no room to advance"),
        (("--train-file", "absent.json"), "absent.json: no such file"),
        (("--split", "80-20"), "--split 80-20 draws its test rows from train"),
        (("--max-new-tokens", 9), "--head span has no use for --max-new-tokens: leave it out"),
        (("--seed", 1, "--head", "generate"), "--head generate has no use for --doc-stride: leave it out"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(qa, flags, said):
    _, train, _, _ = qa
    run = train("qa-refused", *flags, expect=2)
    assert said in run.refusal() and not run.folder.exists()


def test_what_a_model_has_no_use_for_is_refused(qa, workplace):
    train_once, _, evaluate, files = qa
    causal = ("--model", workplace.model, "--test-file", files["test"])
    said = "which writes its answers, has no use for --n-best: leave it out"
    assert said in evaluate("qa-prompted", *causal, "--n-best", 3, expect=2).refusal()
    tuned = ("--model", train_once("qa").folder / "final")
    said = "which answers with a span head, has no use for --max-new-tokens, --shots: leave it out"
    assert said in evaluate("qa-spans", *tuned, "--shots", 2, "--max-new-tokens", 4, expect=2).refusal()
