"""Test scores over seeds, and a sweep's choice, which depends only on the validation split."""

import json
import re

import pytest
from fake_run import write_run

from zerotune.errors import Refused
from zerotune.settings.flags import train_parser
from zerotune.sweep.summary import spread, summarise
from zerotune.tasks.sst2 import SST2


@pytest.fixture
def rates(tmp_path):
    (tmp_path / "rates.txt").write_text("--learning-rate 0.1 0.2 0.3\n")
    return str(tmp_path / "rates.txt")


def runs(tmp_path, *flags):
    return train_parser("", SST2).read([*flags, "--output-dir", str(tmp_path / "parent")]).runs


def summary(planned, failed=None) -> dict:
    report = summarise(planned, failed or {})
    assert report == planned.folder / "report.html"
    return json.loads((planned.folder / "summary.json").read_text())


def test_the_deviation_is_that_of_a_sample():
    assert spread([1.0, 2.0, 3.0]) == {"n": 3, "mean": 2.0, "sd": 1.0, "values": [1.0, 2.0, 3.0]}
    assert spread([0.5])["sd"] is None


def test_seeds_give_mean_and_deviation_of_validation_and_test(tmp_path, capsys):
    planned = runs(tmp_path, "--seeds", "0", "1", "2")
    for seed in range(3):
        write_run(planned.folder / f"seed-{seed}", 0.8 + seed / 100, 0.6 + seed / 50)
    found = summary(planned)
    (setting,) = found["settings"]
    assert setting["validation"]["mean"] == pytest.approx(0.81) and setting["validation"]["sd"] == pytest.approx(0.01)
    assert setting["test"]["accuracy"]["sd"] == pytest.approx(0.02) and setting["test"]["accuracy"]["n"] == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["mean", "±", "sd", "values", "of", "3", "seeds"]
    assert out[1].split() == ["validation", "accuracy", "0.8100", "±", "0.0100", "0.8000", "0.8100", "0.8200"]
    assert out[2].split() == ["test", "accuracy", "0.6200", "±", "0.0200", "0.6000", "0.6200", "0.6400"]
    page = (planned.folder / "report.html").read_text()
    assert page.count('<a href="seed-') == 3 and 'href="seed-2/report.html"' in page and "0.6200 ± 0.0200" in page


def test_a_sweep_is_chosen_by_validation_and_only_the_chosen_test_score_is_said(tmp_path, rates, capsys):
    """The rate 0.1 has the best test score but the worst validation score."""
    planned = runs(tmp_path, "--sweep", rates, "--seeds", "0", "1")
    for rate, validation, test in (("0.1", 0.70, 0.9111), ("0.2", 0.74, 0.6222), ("0.3", 0.73, 0.8333)):
        for seed in (0, 1):
            write_run(planned.folder / f"learning_rate-{rate}_seed-{seed}", validation + (-1) ** seed * 0.01, test)
    found = summary(planned)
    assert found["chosen"] == {"learning_rate": "0.2"} and [one["rank"] for one in found["settings"]] == [3, 1, 2]
    assert [("test" in one) for one in found["settings"]] == [False, True, False]
    out = capsys.readouterr().out
    assert re.search(r"learning rate 0\.2 +0\.7400 ± 0\.0141   2   chosen\nlearning rate 0\.3 ", out)
    assert out.endswith(
        "chosen by validation accuracy: learning rate 0.2; test accuracy 0.6222 ± 0.0000 (mean ± sd of 2 seeds)\n"
    )
    page = (planned.folder / "report.html").read_text()
    for text in (out, page, json.dumps(found)):
        assert "0.6222" in text and "0.9111" not in text and "0.8333" not in text


def test_of_equal_settings_the_lower_loss_wins_and_the_tie_is_said(tmp_path, rates, capsys):
    planned = runs(tmp_path, "--sweep", rates)
    for rate, loss in (("0.1", 0.5), ("0.2", 0.4), ("0.3", 0.6)):
        write_run(planned.folder / f"learning_rate-{rate}", 0.8, 0.5, loss=loss)
    assert summary(planned)["chosen"] == {"learning_rate": "0.2"}
    said = (
        "learning rate 0.2 (as good as 2 others; ties go to the lower validation loss if losses can be compared, then "
    )
    said += "to the first); test"
    assert said in capsys.readouterr().out and said in (planned.folder / "report.html").read_text()


def test_the_lowest_loss_is_chosen_and_of_equal_ones_the_first(tmp_path, rates):
    planned = runs(tmp_path, "--sweep", rates, "--choose-by", "loss")
    for rate, validation in (("0.1", 0.7), ("0.2", 0.8), ("0.3", 0.8)):  # losses 0.3, 0.2, 0.2
        write_run(planned.folder / f"learning_rate-{rate}", validation, 0.5, choose_by="loss")
    assert summary(planned)["chosen"] == {"learning_rate": "0.2"}


@pytest.mark.parametrize("is_sweep", [False, True], ids=["seeds", "sweep"])
def test_a_loss_keeps_its_digits_beside_scores_in_percent(tmp_path, rates, capsys, is_sweep):
    planned = runs(tmp_path, *(("--sweep", rates) if is_sweep else ("--seeds", "0", "1", "2")), "--choose-by", "loss")
    for number, member in enumerate(planned.members):
        write_run(planned.folder / member.name, 0.8, 0.5, choose_by="loss", loss=1.2345 + number)
        scores = {"task": "squad", "setting": "head", "count": 100, "exact": 61.25, "exact_ci95": [50.0, 70.0]}
        (planned.folder / member.name / "eval/final/metrics.json").write_text(json.dumps(scores))
    summary(planned)
    for text in (capsys.readouterr().out, (planned.folder / "report.html").read_text()):
        assert all(loss in text for loss in ("1.2345", "2.2345", "3.2345"))
        assert "61.25" in text and "61.2500" not in text


def test_a_setting_without_all_of_its_runs_is_not_ranked(tmp_path, rates, capsys):
    planned = runs(tmp_path, "--sweep", rates, "--seeds", "0", "1")
    for rate in ("0.1", "0.2"):
        write_run(planned.folder / f"learning_rate-{rate}_seed-0", 0.5 + float(rate), 0.5)
    assert summary(planned)["chosen"] is None and "no setting is chosen" in capsys.readouterr().out
    write_run(planned.folder / "learning_rate-0.1_seed-1", 0.6, 0.5)
    found = summary(planned, {"learning_rate-0.2_seed-1": "failed with status 1"})
    assert found["chosen"] == {"learning_rate": "0.1"} and [one["rank"] for one in found["settings"]] == [1, None, None]
    out = capsys.readouterr().out
    assert "1 of 2, not ranked" in out and "–   0 of 2, not ranked" in out
    page = (planned.folder / "report.html").read_text()
    assert (
        "learning_rate-0.2_seed-1: failed with status 1" in page and "learning_rate-0.3_seed-1: is not finish" in page
    )


@pytest.mark.parametrize("what", ["rows", "source"])
def test_runs_that_validated_on_different_rows_are_not_ranked(tmp_path, rates, what):
    """Ids count rows, so that those of two files can be the same."""
    planned = runs(tmp_path, "--sweep", rates)
    for rate in ("0.1", "0.2", "0.3"):
        write_run(planned.folder / f"learning_rate-{rate}", 0.5, 0.5, **{what: rate})
    with pytest.raises(Refused, match=r"learning_rate-0.1 and learning_rate-0.2 validated on different rows"):
        summarise(planned, {})


def test_seeds_of_different_data_have_no_mean(tmp_path):
    planned = runs(tmp_path, "--seeds", "0", "1")
    for seed in ("0", "1"):
        write_run(planned.folder / f"seed-{seed}", 0.5, 0.5, data=seed)
    with pytest.raises(Refused, match=r"must have the same inputs: 'data' changed between 'seed-0', 'seed-1'"):
        summarise(planned, {})


def test_settings_of_different_data_are_not_ranked(tmp_path, rates):
    planned = runs(tmp_path, "--sweep", rates)
    for rate in ("0.1", "0.2", "0.3"):
        write_run(planned.folder / f"learning_rate-{rate}", 0.5, 0.5, data=rate == "0.3")
    with pytest.raises(Refused, match=r"'data' changed between learning_rate-0.1 and learning_rate-0.3; use another"):
        summarise(planned, {})


def test_a_swept_training_file_may_differ(tmp_path):
    (tmp_path / "files.txt").write_text("--train-file a.tsv b.tsv\n")
    flags = ("--validation-file", "v.tsv", "--test-file", "t.tsv", "--sweep", str(tmp_path / "files.txt"))
    planned = runs(tmp_path, *flags)
    for name, score in (("a.tsv", 0.5), ("b.tsv", 0.6)):
        write_run(planned.folder / f"train_file-{name}", score, 0.5, data=name)
    assert summary(planned)["chosen"] == {"train_file": "b.tsv"}


def test_losses_of_different_heads_break_no_tie(tmp_path):
    (tmp_path / "heads.txt").write_text("--head classify generate\n")
    planned = runs(tmp_path, "--sweep", str(tmp_path / "heads.txt"))
    for head, loss in (("classify", 2.0), ("generate", 1.0)):
        write_run(planned.folder / f"head-{head}", 0.5, 0.5, loss=loss)
    assert summary(planned)["chosen"] == {"head": "classify"}


def test_a_damaged_result_is_named(tmp_path):
    planned = runs(tmp_path, "--seeds", "0")
    write_run(planned.folder / "seed-0", 0.5, 0.5)
    (planned.folder / "seed-0/metrics.jsonl").write_text("")
    with pytest.raises(Refused, match=r"seed-0/metrics.jsonl has no eval_accuracy of step 2"):
        summarise(planned, {})
