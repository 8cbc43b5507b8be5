"""Test several prompts for the same items: how they are drawn, and the summary of their scores."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from default_settings import run_settings
from tiny_models import tiny_model

from zerotune.errors import Refused
from zerotune.evaluation.prompt_seeds import check_prompt_seeds, plan_evaluations, spread, summarise_seeds
from zerotune.files import read_json, write_json
from zerotune.models.pretrained import read_config
from zerotune.settings.groups import DataSettings, EvalSettings, ModelSettings, PromptSettings
from zerotune.tasks.splits import Example

TASK = SimpleNamespace(name="mood", labels=("no", "yes"), wordings=(("{text}", ("no", "yes")), ("{text}?", ("n", "y"))))
LABELLED = [Example(f"train-{number}", f"text {number}", number % 2) for number in range(20)]
SPLIT = {"sources": {"test": {"sha256": "abc"}, "train": {"sha256": "def"}}}


def settings(seed=0, **prompt):
    return EvalSettings(
        task="mood",
        model=ModelSettings("m", precision="bf16"),
        data=DataSettings(),
        run=run_settings("out"),
        prompt=PromptSettings(**prompt),
        tokens_per_device=512,
        seed=seed,
    )


def test_without_prompt_seeds_there_is_one_evaluation_in_the_folder_itself():
    ((folder, one),) = plan_evaluations(settings(seed=3), TASK, [], SPLIT).items()
    assert folder == Path("out") and (one.seed, one.shots, one.wording, one.data_sha256) == (3, (), 0, "abc")
    assert (one.model.precision, one.tokens_per_device) == ("bf16", 512)


def test_prompts_differ_in_shots_and_wording_and_the_first_is_the_plain_one():
    plans = plan_evaluations(settings(seed=3, shots=2, seeds=3), TASK, LABELLED, SPLIT)
    assert list(plans) == [Path("out/seed-0"), Path("out/seed-1"), Path("out/seed-2")]
    several = list(plans.values())
    assert [(each.seed, each.wording) for each in several] == [(3, 0), (4, 1), (5, 0)]
    assert all(sorted(shot.label for shot in each.shots) == [0, 1] for each in several)
    assert len({each.shots for each in several}) == 3
    (plain,) = plan_evaluations(settings(seed=3, shots=2), TASK, LABELLED, SPLIT).values()
    assert plain.shots == several[0].shots and plain.wording == several[0].wording


def test_prompt_seeds_that_vary_nothing_are_refused():
    causal, encoder = (read_config(tiny_model(kind), None) for kind in ("llama", "bert"))
    check_prompt_seeds(settings(), TASK, encoder)
    check_prompt_seeds(settings(seeds=2), TASK, causal)
    check_prompt_seeds(settings(seeds=9, shots=1), TASK, causal)
    with pytest.raises(Refused, match="only the wording can vary, and mood has 2 of them"):
        check_prompt_seeds(settings(seeds=3), TASK, causal)
    with pytest.raises(Refused, match="no use for --prompt-seeds"):
        check_prompt_seeds(settings(seeds=2), TASK, encoder)


def test_the_summary_by_hand(tmp_path, capsys):
    for number, (accuracy, plain) in enumerate([(0.5, 0.25), (0.75, 0.5), (1.0, 0.75)]):
        (tmp_path / f"seed-{number}").mkdir()
        metrics = {
            "seed": number, "prompt": f"p{number}", "label_words": ["no", "yes"], "shot_ids": [], "count": 9,
            "setting": "few-shot prompt",
            "accuracy": accuracy, "accuracy_ci95": [0.0, 1.0], "uncalibrated_accuracy": plain,
        }  # fmt: skip
        write_json(tmp_path / f"seed-{number}" / "metrics.json", metrics)
    summarise_seeds(tmp_path, 3)
    summary = read_json(tmp_path / "summary.json")
    assert list(summary) == ["num_seeds", "accuracy", "uncalibrated_accuracy", "seeds"]
    assert summary["accuracy"] == {"mean": 0.75, "sd": 0.25, "range": [0.5, 1.0]}
    assert summary["seeds"][1] == {
        "seed": 1, "prompt": "p1", "label_words": ["no", "yes"], "shot_ids": [], "accuracy": 0.75,
        "uncalibrated_accuracy": 0.5,
    }  # fmt: skip
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["mean", "sd", "lowest", "highest", "over", "3", "prompts"]
    assert first.split() == ["accuracy", "0.7500", "0.2500", "0.5000", "1.0000"]
    assert second.split()[:2] == ["uncalibrated", "accuracy"]


def test_metrics_of_another_form_have_no_summary(tmp_path):
    (tmp_path / "seed-0").mkdir()
    metrics = {"seed": 0, "prompt": 7, "label_words": ["no", "yes"], "shot_ids": [], "count": 9, "setting": "prompt"}
    write_json(tmp_path / "seed-0" / "metrics.json", metrics)
    with pytest.raises(Refused, match=r"seed-0/metrics.json is damaged \(prompt is 7, wanted a valid string\)"):
        summarise_seeds(tmp_path, 1)


def test_one_value_has_no_deviation():
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "range": [0.5, 0.5]}
