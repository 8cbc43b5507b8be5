"""Test eval/compare.py: its comparisons, its refusals, and its quick start."""

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from zerotune.errors import Refused
from zerotune.files import write_json, write_json_lines
from zerotune.metrics.evaluations import score_names
from zerotune.metrics.labels import classification_metrics
from zerotune.report.comparison import (
    comparison_table,
    evaluation_folders,
    evaluation_names,
    read_comparison,
    write_comparison,
)

SCRIPT = Path(__file__).parents[2] / "eval" / "compare.py"
LABELS, NAMES = [0, 1] * 20, ("negative", "positive")


def evaluation(folder, wrong, labels=LABELS, prefix="item", **settings):
    """Make a folder that an eval script could have written; `wrong` holds the positions of the wrong predictions."""
    folder.mkdir(parents=True)
    predictions = [1 - label if i in wrong else label for i, label in enumerate(labels)]
    lines = [
        {"id": f"{prefix}-{i}", "label": label, "prediction": prediction, "scores": [-0.5, -0.9]}
        for i, (label, prediction) in enumerate(zip(labels, predictions, strict=True))
    ]
    write_json_lines(folder / "predictions.jsonl", lines)
    metrics = (
        {"count": len(labels)}
        if settings.get("task") == "squad"
        else classification_metrics(labels, predictions, NAMES)
    )
    defaults = {"task": "sst2", "model": "some/model", "method": "full", "setting": "classifier head", "seed": 0}
    defaults |= {"training_sha256": "5a"}
    write_json(folder / "metrics.json", {**metrics, **defaults, **settings})
    return folder


def compare(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_folders_through_the_command(tmp_path):
    # The first is wrong on 0-7, the second on 6-9: of 40 items, only the first is right on 8-9, only the second on 0-5.
    first = evaluation(tmp_path / "a" / "final", set(range(8)))
    second = evaluation(tmp_path / "b" / "final", set(range(6, 10)), method="lora")
    result = compare(first, second, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "out" / "report.html") in result.stdout
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (pair,) = record["paired"]
    assert (pair["only_first"], pair["only_second"], pair["num_common"]) == (2, 6, 40)
    assert pair["p_value"] == pytest.approx(binomtest(2, 8).pvalue) == pair["p_value_holm"]
    assert pair["difference"] == pytest.approx(36 / 40 - 32 / 40)
    low, high = pair["difference_ci95"]
    assert low < pair["difference"] < high
    assert [row["metrics"]["accuracy"] for row in record["evaluations"]] == [0.8, 0.9]
    assert record["seeds"] == []
    html = (tmp_path / "out" / "report.html").read_text()
    assert "No mean over seeds: the evaluations differ in method." in html
    assert "Holm" not in html and "<script" not in html and "<svg" in html


def test_three_folders_are_holm_corrected_on_common_items_only(tmp_path):
    first = evaluation(tmp_path / "a", set(range(12)))
    second = evaluation(tmp_path / "b", set(), setting="zero-shot prompt")
    third = evaluation(tmp_path / "c", {0}, labels=LABELS[:10], setting="few-shot prompt")
    write_comparison(read_comparison([first, second, third]), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    p_values = [pair["p_value"] for pair in record["paired"]]
    assert p_values == pytest.approx([2 * 0.5**12, 2 * 0.5**9])
    assert [pair["p_value_holm"] for pair in record["paired"]] == pytest.approx([2 * p_values[0], p_values[1]])
    assert [pair["num_common"] for pair in record["paired"]] == [40, 10]
    assert "Holm" in (tmp_path / "out" / "report.html").read_text()


def test_a_spread_is_called_after_its_folder_and_after_all_runs_only_if_it_is_of_all(tmp_path):
    seeds = [evaluation(tmp_path / f"41/seed-{seed}/eval/final", {seed}, seed=seed) for seed in range(2)]
    other = evaluation(tmp_path / "tickets/eval/final", {1, 2, 3}, model="another/model", seed=7)
    spread = ", over 2 training seeds: accuracy"
    assert f"\nall runs{spread}" in comparison_table(read_comparison(seeds))
    assert f"\n41{spread}" in comparison_table(read_comparison([*seeds, other]))


def test_seeds_of_one_command_give_mean_and_spread(tmp_path):
    folders = [evaluation(tmp_path / f"seed-{seed}", set(range(4 * seed)), seed=seed) for seed in range(3)]
    other = evaluation(tmp_path / "other", {1, 2, 3}, model="another/model", seed=7)
    comparison = read_comparison([*folders, other])
    assert f"{tmp_path.name}, over 3 training seeds: accuracy 90.00 ± 10.00 %" in comparison_table(comparison)
    write_comparison(comparison, tmp_path / "out")
    (spread,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"]
    assert spread["seeds"] == [0, 1, 2] and spread["folders"] == [str(folder) for folder in folders]
    accuracy = spread["accuracy"]
    assert accuracy["values"] == [1.0, 0.9, 0.8]
    # Mean 0.9; deviations 0.1, 0, -0.1: variance 0.02 / 2.
    assert (accuracy["mean"], accuracy["sd"]) == pytest.approx((0.9, 0.1))
    assert (accuracy["low"], accuracy["high"]) == (0.8, 1.0)
    names = score_names(json.loads((other / "metrics.json").read_text()))
    assert len(names) == 10 and spread["metrics"] == names and set(names) <= spread.keys()
    assert "90.00 ± 10.00" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"training_sha256": None}, "a model that zerotune has not tuned has no training seed"),
        ({"labels": LABELS[:10]}, "the evaluations are of different items"),
    ],
)
def test_seeds_that_are_none_have_no_mean(tmp_path, change, reason):
    folders = [evaluation(tmp_path / "a", {1}, **change), evaluation(tmp_path / "b", {2}, seed=1)]
    if "training_sha256" in change:
        folders.append(evaluation(tmp_path / "c", {1}, seed=2, **change))
    write_comparison(read_comparison(folders), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"] == []
    assert f"No mean over seeds: {reason}." in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("seed", "reason"), [(0, "seed 0 appears twice"), (None, "the seeds are not known")])
def test_a_seed_that_is_there_twice_is_named(tmp_path, seed, reason):
    folders = [evaluation(tmp_path / name, {1}, seed=each) for name, each in (("a", 0), ("b", 1), ("c", seed))]
    write_comparison(read_comparison(folders), tmp_path / "out")
    assert f"No mean over seeds: {reason}." in (tmp_path / "out" / "report.html").read_text()


def test_an_unfinished_run_of_a_folder_is_named(tmp_path, capsys):
    for seed in range(2):
        evaluation(tmp_path / f"runs/seed-{seed}/eval/final", {seed}, seed=seed)
    (tmp_path / "runs/seed-2/eval/final/.partial").mkdir(parents=True)  # stopped in its final evaluation
    (tmp_path / "runs/seed-2/run.json").write_text("{}")
    assert len(evaluation_folders(tmp_path / "runs")) == 2
    assert capsys.readouterr().out == f"{tmp_path}/runs/seed-2 has no final evaluation yet and is left out\n"


def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"cannot be read \(File name too long\): name evaluations, runs or folders"):
        read_comparison([tmp_path / ("x" * 300), tmp_path])


def test_two_folders_of_prompts_with_the_same_name_are_told_apart(tmp_path):
    for place in ("one", "two"):
        for seed in range(2):
            evaluation(tmp_path / place / f"gemma/seed-{seed}", {seed}, training_sha256=None)
        (tmp_path / place / "gemma/summary.json").write_text("{}")
    table = comparison_table(read_comparison([tmp_path / "one/gemma", tmp_path / "two/gemma"]))
    assert "one/gemma, over 2 prompts" in table and "two/gemma, over 2 prompts" in table


def test_evaluations_beside_the_runs_of_a_sweep_are_no_prompts(tmp_path):
    sweep = tmp_path / "sweep"
    for rate in ("1", "2"):
        evaluation(sweep / f"rate-{rate}/eval/final", {3})
        evaluation(sweep / f"checked-{rate}", {4, 5})
    write_json(sweep / "summary.json", {})
    runs = {f"rate-{rate}": ["--learning-rate", rate] for rate in "12"}
    write_json(sweep / "sweep.json", {"script": "s", "flags": {}, "sweep": {}, "seeds": [], "runs": runs})
    assert [one.parts[-3] for one in evaluation_folders(sweep)] == ["rate-1", "rate-2"]
    table = comparison_table(read_comparison([sweep / "checked-1", sweep / "checked-2"]))
    assert "prompts" not in table, table


def test_one_label_and_any_number_are_not_compared(tmp_path):
    several = evaluation(tmp_path / "several", {1}, exact_match=0.975, exact_match_ci95=[0.9, 1.0])
    with pytest.raises(Refused, match=r"several by exact_match and .* by accuracy"):
        read_comparison([several, evaluation(tmp_path / "one", {1})])


def test_what_seeds_did_not_all_score_has_no_mean(tmp_path):
    """One seed has no METEOR, because WordNet was missing; uncalibrated scores do not count as settings."""
    scores = {"exact": 97.5, "f1": 98.0, "exact_ci95": [87, 99], "f1_ci95": [90, 99], "uncalibrated_exact": 1.0}
    first = evaluation(tmp_path / "a", {1}, task="squad", meteor=7.0, meteor_ci95=[6, 8], **scores)
    second = evaluation(tmp_path / "b", {2}, task="squad", seed=1, **{**scores, "uncalibrated_exact": 2.0})
    write_comparison(read_comparison([first, second]), tmp_path / "out")
    (spread,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"]
    assert spread["metrics"] == ["exact", "f1"]


@pytest.mark.parametrize("held", ["run.json", "report.html", "comparison.json"])
def test_another_report_is_not_overwritten(tmp_path, held):
    folders = [evaluation(tmp_path / "a", {1}), evaluation(tmp_path / "b", {2})]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).write_text('{"mine": 1}')
    with pytest.raises(Refused, match="holds a run or another report: name a folder of its own"):
        write_comparison(read_comparison(folders), tmp_path / "out")
    assert (tmp_path / "out" / held).read_text() == '{"mine": 1}'


def test_the_same_seed_twice_is_no_spread(tmp_path):
    folders = [evaluation(tmp_path / name, {1}, seed=3) for name in ("a", "b")]
    write_comparison(read_comparison(folders), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"] == []
    assert "No mean over seeds: seed 3 appears twice." in (tmp_path / "out" / "report.html").read_text()


def run_of(folder, engine, num_steps=20, **timings):
    """Make a run folder with curves; returns its eval/final."""
    final = evaluation(folder / "eval" / "final", {1}, method=engine)
    steps = [
        {"step": step, "epoch": step / 10, "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
        for step in range(1, num_steps + 1)
    ]
    evaluations = [{"step": num_steps, "epoch": 2.0, "eval_loss": 0.3, "eval_accuracy": 0.9, "eval_f1_macro": 0.9}]
    write_json_lines(folder / "metrics.jsonl", steps + evaluations)
    run = {"flags": {"engine": engine}, "world": {"num_processes": 2}, "timings": timings}
    write_json(folder / "run.json", run)
    return final


def test_runs_are_shown_side_by_side(tmp_path):
    speed = {"train_tokens_per_s": 5000.0, "train_s": 12.5, "peak_memory_bytes": 3 * 2**29}
    loop = run_of(tmp_path / "by-loop", "loop", train_examples_per_s=300.0, **speed)
    trainer = run_of(tmp_path / "by-trainer", "trainer", num_steps=16, train_examples_per_s=150.0)
    alone = evaluation(tmp_path / "elsewhere" / "final", {2}, method="lora")
    html = write_comparison(read_comparison([loop, trainer, alone]), tmp_path / "out").read_text()
    training = html[html.index("<h2>Training</h2>") :]
    training = training[: training.index("</section>")]
    titles = re.findall(r"<h3>(.*?)</h3>", training)
    assert titles == [
        "Loss", "Loss on the validation split", "Accuracy on the validation split",
        "Learning rate", "Gradient norm",
    ]  # fmt: skip
    assert training.count(">by-loop<") == training.count(">by-trainer<") == 1 + len(titles)
    rows = re.findall(r"<th class=\"long\">(.*?)</th><td.*?>(.*?)</td><td.*?>(.*?)</td>", training)
    assert rows == [
        ("device", "–", "–"),
        ("engine", "loop", "trainer"),
        ("processes", "2", "2"),
        ("optimizer steps", "20", "16"),
        ("train examples", "300 per second", "150 per second"),
        ("train tokens", "5000 per second", "–"),
        ("train", "12.5 s", "–"),
        ("peak memory", "1.50 GiB", "–"),
    ]
    assert "elsewhere" not in training


def test_a_fifth_run_is_named_beneath_the_curves(tmp_path):
    finals = [run_of(tmp_path / name, "loop") for name in ("a", "b", "c", "d", "e")]
    assert "Without curves: e." in write_comparison(read_comparison(finals), tmp_path / "out").read_text()


def test_evaluations_that_belong_to_no_run_have_no_training_section(tmp_path):
    folders = [evaluation(tmp_path / name, {1}) for name in ("a", "b")]
    assert "<h2>Training</h2>" not in write_comparison(read_comparison(folders), tmp_path / "out").read_text()


def without(name):
    def change(folder):
        (folder / name).unlink()

    return change


def unlabelled(folder):
    lines = [{"id": "item-0", "label": None, "prediction": 1, "scores": [-1, -1]}]
    write_json_lines(folder / "predictions.jsonl", lines)


def torn(folder):
    path = folder / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


def twice(folder):
    path = folder / "predictions.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])


def broken(folder):
    (folder / "metrics.json").write_text("{")


def without_scores(folder):
    write_json(folder / "metrics.json", {"task": "sst2", "setting": "prompt", "count": 40})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("predictions.jsonl"), "holds no predictions.jsonl, so it is no evaluation"),
        (without("metrics.json"), "holds no metrics.json, so it is no evaluation"),
        (unlabelled, "a score needs labelled predictions"),
        (torn, "metrics.json counts 40 items, predictions.jsonl has 37"),
        (twice, "ids occur twice in"),
        (broken, r"metrics\.json is damaged"),
        (without_scores, "an evaluation of sst2 has accuracy"),
    ],
)
def test_a_folder_that_is_no_whole_evaluation_is_refused(tmp_path, change, words):
    good, bad = evaluation(tmp_path / "good", {1}), evaluation(tmp_path / "bad", {2})
    change(bad)
    with pytest.raises(Refused, match=words) as refusal:
        write_comparison(read_comparison([good, bad]), tmp_path / "out")
    assert str(bad) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": "other"}, "share no id"),
        ({"labels": [1, 0] * 20}, "label item-0 as 0 and 1"),
        ({"task": "imdb"}, "and these are of imdb and sst2"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(tmp_path, options, words):
    folders = [evaluation(tmp_path / "a", {1}), evaluation(tmp_path / "b", {2}, **options)]
    with pytest.raises(Refused, match=words):
        write_comparison(read_comparison(folders), tmp_path / "out")


def test_one_folder_is_no_comparison(tmp_path):
    folder = evaluation(tmp_path / "a", {1})
    with pytest.raises(Refused, match="two evaluation folders or more, got 1"):
        write_comparison(read_comparison([folder]), tmp_path / "out")
    with pytest.raises(Refused, match="named twice"):
        write_comparison(read_comparison([folder, tmp_path / "a" / ".." / "a"]), tmp_path / "out")


def test_a_refusal_ends_with_2_and_one_line(tmp_path):
    result = compare(evaluation(tmp_path / "a", {1}), tmp_path / "nothing", "--output-dir", tmp_path / "out")
    assert result.returncode == 2
    assert (
        result.stderr.removeprefix("loading the libraries\n").strip().count("\n") == 0
        and "no such folder" in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_main_takes_parsed_arguments(tmp_path, capsys):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import compare as script
    finally:
        sys.path.pop(0)
    folders = [evaluation(tmp_path / "a", {1}), evaluation(tmp_path / "b", {2})]
    script.main(Namespace(evaluations=folders, output_dir=tmp_path / "out"))
    assert "report.html" in capsys.readouterr().out


def test_help_is_quick_and_shows_the_launch_line():
    start = time.perf_counter()
    result = compare("--help")
    # Measured 0.1 s; 2 s is the contract, and importing torch already takes longer.
    assert time.perf_counter() - start < 2
    assert result.returncode == 0 and "python eval/compare.py runs/a runs/b" in result.stdout


def test_names_have_the_run_and_what_else_tells_them_apart():
    cases = {
        ("runs/a/eval/final", "runs/b/eval/final"): ["a", "b"],
        ("runs/a/eval/base", "runs/a/eval/final"): ["a/base", "a"],
        ("runs/x/a", "runs/y/a"): ["x/a", "y/a"],
        ("runs/gemma/seed-0", "runs/gemma/seed-1"): ["gemma/seed-0", "gemma/seed-1"],
    }
    assert [evaluation_names(list(map(Path, paths))) for paths in cases] == list(cases.values())


def test_runs_and_prompt_seeds_stand_for_their_evaluations(tmp_path):
    runs = [run_of(tmp_path / name, "loop").parents[1] for name in ("a", "b")]
    seeds = [evaluation(tmp_path / f"prompts/seed-{number}", {number}) for number in range(11)]
    write_json(tmp_path / "prompts/summary.json", {"num_seeds": 11})
    (runs[0] / "final").mkdir()
    found = [one for folder in (runs[0] / "final", runs[1], tmp_path / "prompts") for one in evaluation_folders(folder)]
    assert found == [runs[0] / "eval/final", runs[1] / "eval/final", *seeds]
    comparison = read_comparison([runs[0], tmp_path / "prompts"])
    assert comparison.names[:2] == ["a", "prompts/seed-0"]
    lines = comparison_table(comparison).splitlines()
    assert len(lines) == 1 + 12 + 1 and "prompts, over 11 prompts: accuracy 97.50" in lines[-1]
    page = write_comparison(comparison, tmp_path / "out").read_text()
    assert "on average over 11 prompts, which give" in page
    assert "All 12 evaluations" in page and "Tests of 11 prompts" in page and "prompts/seed-0 is" not in page


def test_many_evaluations_are_rows_and_few_are_columns(tmp_path):
    folders = [evaluation(tmp_path / f"model-{number}", {number}) for number in range(7)]
    few, many = (
        write_comparison(read_comparison(chosen), tmp_path / name).read_text()
        for chosen, name in ((folders[:6], "few"), (folders, "many"))
    )
    header = '<th class="number">items</th>'
    assert header in many.split("Paired tests")[0] and header not in few.split("Paired tests")[0]
    assert "The same in all" in many and "The same in all" not in few
    assert all(f"model-{number} is not shown to differ from model-0 in accuracy" in many for number in range(1, 7))


def test_without_a_folder_the_table_is_printed_and_nothing_written(tmp_path):
    first, second = evaluation(tmp_path / "a", set(range(8))), evaluation(tmp_path / "b", set(range(6, 10)))
    result = compare(first, second)
    head, one, other = result.stdout.splitlines()
    assert head.split()[0] == "accuracy" and one.split()[:3] == ["a", "80.00", "%"]
    assert other.split()[0] == "b" and "+10.00" in other and "0.29" in other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
