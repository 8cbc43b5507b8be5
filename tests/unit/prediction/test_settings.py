"""Test eval/predict.py's flags: one input, and the flags that belong to it."""

import os

import pytest

from zerotune.errors import Refused
from zerotune.prediction.settings import predict_parser, predict_settings


def resolve(*flags):
    return predict_settings(predict_parser("").parse_args([*flags, "--precision", "fp32"]))


def test_a_file_and_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    found = resolve("--model", "m", "--file", "-", "--format", "csv", "--text-column", "a, b", "--load-4bit")
    assert (found.source.file, found.source.kind, found.source.columns) == ("-", "csv", ("a", "b"))
    assert (found.model.name, found.model.method, found.top_k, found.prefix) == ("m", "qlora", 1, "")
    assert resolve("one", "two", "--model", "m").source.texts == ("one", "two")
    assert not found.resumes and not resolve("--model", "m", "--file", "-", "--output", "b.csv").resumes
    assert resolve("--model", "m", "--file", "a.csv", "--output", "b.csv").resumes
    os.mkfifo("pipe")
    assert not resolve("--model", "m", "--file", "pipe", "--format", "csv", "--output", "b.csv").resumes
    for files in (["a.csv"], ["a.csv", "a.csv"]):
        with pytest.raises(Refused, match=r"^a\.csv is a file: give it with --file$"):
            resolve("--model", "m", *files)
    assert resolve("--model", "m", "a.csv", "x" * 5000).source.texts[0] == "a.csv"
    with pytest.raises(Refused, match=r"b.csv: no such file"):
        resolve("--model", "m", "--file", "b.csv")
    with pytest.raises(Refused, match=r"--output a\.csv already exists"):
        resolve("--model", "m", "text", "--output", "a.csv")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "none is given$"),
        (["--labels", "spam", "ham", "a text"], r"none is given \(texts go before --labels\)$"),
        (["a", "--file", "x.csv"], "texts and --file are given"),
        (["--question", "who", "--file", "x.csv"], "--question and --file are given"),
        (["--question", "who"], "--context is missing"),
        (["--context", "who"], "--question is missing"),
        (["a", "--format", "csv"], "--format needs --file"),
        (["--file", "x.csv", "--text-column", "a,b,c"], "a text is one column, or two"),
    ],
)
def test_what_does_not_belong_together_is_refused(flags, reason):
    with pytest.raises(Refused, match=reason):
        resolve("--model", "m", *flags)


def test_a_model_is_wanted():
    with pytest.raises(Refused, match="--model is missing"):
        resolve("a")


def test_a_run_means_its_final(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert resolve("a", "--model", str(run)).model.name == str(run)
    (run / "run.json").write_text("{}")
    with pytest.raises(Refused, match="has no final/ yet"):
        resolve("a", "--model", str(run))
    (run / "final").mkdir()
    assert resolve("a", "--model", str(run)).model.name == str(run / "final")
