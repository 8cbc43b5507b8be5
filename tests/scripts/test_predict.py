"""Run eval/predict.py as a process: texts and files in, labels and answers out, compared with the stock models."""

import csv
import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from launching import REPOSITORY
from tiny_models import LABELS, WORDS, character_model, task_record, tiny_model, tuned_model
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from zerotune.files import read_json_lines
from zerotune.models.final_folder import save_final
from zerotune.randomness import random_order

# float32 in a padded batch against a single row, and probabilities rounded to six decimals.
SAME_PROBABILITY = 1e-5
# Padded tokens of a batch, which make chunks of 640 characters: a file of 120 rows has several.
FEW_TOKENS = 10
NUM_ROWS = 120


def sentences(count, seed=1):
    """Return texts of 1 to 10 known words."""
    order = random_order(10_000, seed, "words")
    return [" ".join(WORDS[word % 10] for word in order[place : place + 1 + place % 10]) for place in range(count)]


@pytest.fixture(scope="module")
def folder(workplace):
    """Make a folder with a run, a final/ with a span head, a published classifier and a csv of three columns."""
    place = workplace.folder / "predict"
    (place / "run" / "final").mkdir(parents=True)
    (place / "run" / "run.json").write_text("{}")
    save_final(*tuned_model(tiny_model("bert"), "full"), place / "run" / "final", task_record())
    (place / "span").mkdir()
    record = task_record("span", thresholds={"null_odds": 0.1}, doc_stride=8, n_best=5, max_answer_length=6)
    save_final(*tuned_model(tiny_model("bert"), "full", "span"), place / "span", record)
    names = {"id2label": {0: "calm", 1: "angry", 2: "sad"}, "label2id": {"calm": 0, "angry": 1, "sad": 2}}
    torch.manual_seed(3)
    published = AutoModelForSequenceClassification.from_pretrained(tiny_model("roberta"), **names)
    with torch.no_grad():
        published.classifier.out_proj.weight.mul_(20)
    published.save_pretrained(place / "published")
    AutoTokenizer.from_pretrained(tiny_model("roberta")).save_pretrained(place / "published")
    rows = [[str(number), text, 'äöü, "x"'] for number, text in enumerate(sentences(NUM_ROWS))]
    rows[7][1] = " "
    with (place / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "note"], *rows])
    return place


@pytest.fixture(scope="module")
def predict(workplace, folder):
    """Run eval/predict.py, by default on the tuned run in float32; `name` names the log."""

    def run(name, *flags, model="run", world=1, expect=0, **disturbance):
        more = ["--model", folder / model, "--precision", "fp32"]
        ended = workplace.server.start(
            "eval/predict.py", [*flags, *more], folder / name, world=world, **disturbance
        ).wait()
        assert set(ended.codes) == {expect}, f"{ended.codes}\n{ended.text()}"
        return ended

    return run


def stock_probabilities(folder, texts):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return np.array([each.softmax(-1).tolist() for each in logits])


def without_probabilities(row):
    return {**row, "probability": None, "top_k": [label["label"] for label in row["top_k"] or ()]}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_text_gets_a_line(predict, folder):
    ended = predict("one", "the film was good", "a very  dull film", "--top-k", 2)
    lines = ended.text().splitlines()[-2:]
    texts = ["the film was good", "a very dull film"]
    for line, text, wanted in zip(lines, texts, stock_probabilities(folder / "run/final", texts), strict=True):
        best, other = np.argsort(-wanted)
        assert line == f"{LABELS[best]} {wanted[best]:.4f}, {LABELS[other]} {wanted[other]:.4f}  {text}"


def test_a_table_keeps_its_columns_and_its_order(predict, folder):
    output = folder / "rows-out.csv"
    ended = predict("table", "--file", folder / "rows.csv", "--output", output, "--tokens-per-device", FEW_TOKENS)
    rows, given = read_csv(output), read_csv(folder / "rows.csv")
    assert [{name: row[name] for name in ("id", "text", "note")} for row in rows] == given
    assert rows[7]["prediction"] == rows[7]["probability"] == ""
    assert "1 row has no text and got no prediction; the first is row 8" in ended.text()
    kept = [row for row in rows if row["prediction"]]
    wanted = stock_probabilities(folder / "run/final", [row["text"] for row in kept])
    assert len(kept) == NUM_ROWS - 1
    assert [row["prediction"] for row in kept] == [LABELS[place] for place in wanted.argmax(axis=1)]
    np.testing.assert_allclose([float(row["probability"]) for row in kept], wanted.max(axis=1), atol=SAME_PROBABILITY)
    assert not list(folder.glob("rows-out.csv.*"))
    again = predict("table-again", "--file", folder / "rows.csv", "--output", output, expect=2)
    assert "already exists" in again.refusal()


def test_a_published_classifier_names_its_labels_in_a_parquet_file(predict, folder):
    texts = sentences(5)
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    output = folder / "texts.parquet"
    predict("parquet", "--file", folder / "texts.txt", "--output", output, "--top-k", 3, model="published")
    wanted = stock_probabilities(folder / "published", texts)
    for row, text, probabilities in zip(pyarrow.parquet.read_table(output).to_pylist(), texts, wanted, strict=True):
        assert row["text"] == text and row["prediction"] == row["top_k"][0]["label"]
        found = {each["label"]: each["probability"] for each in row["top_k"]}
        np.testing.assert_allclose(
            [found[name] for name in ("calm", "angry", "sad")], probabilities, atol=SAME_PROBABILITY
        )


def test_two_processes_write_what_one_does(predict, folder):
    flags = ["--file", folder / "rows.csv", "--tokens-per-device", FEW_TOKENS, "--top-k", 2]
    predict("world-1", *flags, "--output", folder / "world-1.jsonl")
    predict("world-2", *flags, "--output", folder / "world-2.jsonl", world=2)
    one, two = (read_json_lines(folder / f"world-{world}.jsonl") for world in (1, 2))
    assert [without_probabilities(row) for row in one] == [without_probabilities(row) for row in two]
    # The batches are the same. On an AMD EPYC two processes still differed by about 1e-7 from one.
    found, wanted = ([label["probability"] for row in rows for label in row["top_k"] or ()] for rows in (two, one))
    np.testing.assert_allclose(found, wanted, atol=SAME_PROBABILITY)
    assert len(two) == NUM_ROWS and len(found) == 2 * (NUM_ROWS - 1)


def test_a_refusal_on_rank_0_ends_both_processes(predict, folder):
    path = folder / "late.csv"
    path.write_text("text\n" + "a good film\n" * 300 + "a,good,film\n")
    flags = ["--file", path, "--output", folder / "late-out.csv", "--tokens-per-device", FEW_TOKENS]
    assert predict("late", *flags, world=2, expect=2).refusal().startswith(f"{path} line 302: 3 fields")


def test_a_row_that_the_output_cannot_hold_is_named(predict, folder):
    path = folder / "late.jsonl"
    rows = [{"text": f"message {number}"} for number in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "a", "more": 1}, *rows]))
    flags = ["--file", path, "--output", folder / "late-row.csv", "--tokens-per-device", FEW_TOKENS]
    refusal = predict("late-row", *flags, expect=2).refusal()
    assert refusal == f"{path} row 301: the first rows have no column 'more': use an --output .jsonl"


@pytest.mark.parametrize("extension", ["csv", "jsonl.gz", "parquet"])
def test_an_interrupted_file_is_continued(predict, folder, extension):
    """SIGTERM after the first chunk; a kill when a chunk is written but not recorded; another input; then the same."""
    whole, output = folder / f"whole.{extension}", folder / f"resumed.{extension}"
    flags = ["--file", folder / "rows.csv", "--tokens-per-device", FEW_TOKENS]
    predict("whole", *flags, "--output", whole)
    record, partial = output.with_name(f"{output.name}.partial.json"), output.with_name(f"{output.name}.partial")
    on_record = {"event": "os.rename", "path": r"resumed.*partial\.json"}
    stopped = predict(
        "stopped", *flags, "--output", output, expect=75, on_event=on_record | {"do": "SIGTERM", "occurrence": 2}
    )
    rows = json.loads(record.read_text())["rows"]
    assert 0 < rows < NUM_ROWS and f"after {rows} rows: the same command continues" in stopped.text()
    predict("killed", *flags, "--output", output, expect=-9, on_event=on_record | {"do": "SIGKILL", "occurrence": 2})
    kept = json.loads(record.read_text())["rows"]
    assert rows < kept < NUM_ROWS and partial.stat().st_size > json.loads(record.read_text())["bytes"]
    changed = folder / f"changed.{extension}.csv"
    lines = (folder / "rows.csv").read_text().splitlines(keepends=True)
    changed.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    other = predict("changed", "--file", changed, *flags[2:], "--output", output, expect=2)
    assert "with different input:" in other.refusal()
    assert "with different flags:" in predict("other", *flags, "--output", output, "--top-k", 2, expect=2).refusal()
    other = predict("other", *flags, "--output", output, model="published", expect=2)
    assert "with different model:" in other.refusal()
    ended = predict("continued", *flags, "--output", output)
    assert f"{kept} rows are predicted already" in ended.text()
    if extension == "parquet":
        assert pyarrow.parquet.read_table(output).equals(pyarrow.parquet.read_table(whole))
    else:
        opened = gzip.open if extension.endswith("gz") else open
        with opened(output) as one, opened(whole) as other:
            assert one.read() == other.read()
    assert not record.exists() and not partial.exists()


def test_standard_input_and_output_hold_rows_alone(workplace, folder):
    texts = sentences(6)
    given = "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts))
    command = [sys.executable, "eval/predict.py", "--model", folder / "run", "--file", "-", "--format", "jsonl"]
    ended = subprocess.run(
        command, input=given, capture_output=True, text=True, cwd=REPOSITORY, env=workplace.environment, check=True
    )
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(row["text"], row["n"]) for row in rows] == list(zip(texts, range(6), strict=True))
    assert all(row["prediction"] in LABELS and 0.5 <= row["probability"] <= 1 for row in rows)


def test_questions_get_spans_and_the_probability_of_none(predict, folder):
    """Compute the score of every span of at most 6 tokens one by one, and compare."""
    questions = [("was the film good", "a bad film was very dull"), ("the film", "bright film not bad")]
    path, output = folder / "questions.jsonl", folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"question": one, "context": two}) + "\n" for one, two in questions))
    predict("questions", "--file", path, "--output", output, "--top-k", 2, model="span")
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "span", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "span")
    for row, (question, context) in zip(map(json.loads, output.read_text().splitlines()), questions, strict=True):
        inputs = tokenizer(question, context, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs)
        starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        places = [place for place, sequence in enumerate(inputs.sequence_ids(0)) if sequence == 1]
        spans = sorted(
            ((starts[one] + ends[two], one, two) for one in places for two in places if 0 <= two - one < 6),
            reverse=True,
        )[:5]
        weights = np.exp([starts[0] + ends[0], *(score for score, _, _ in spans)])
        weights /= weights.sum()
        words = context.split()
        best = [" ".join(words[one - places[0] : two - places[0] + 1]) for _, one, two in spans]
        assert row["no_answer_probability"] == pytest.approx(weights[0], abs=SAME_PROBABILITY)
        assert [each["answer"] for each in row["top_k"]] == best[:2]
        np.testing.assert_allclose([each["probability"] for each in row["top_k"]], weights[1:3], atol=SAME_PROBABILITY)
        abstains = starts[0] + ends[0] - spans[0][0] > 0.1
        assert row["prediction"] == ("" if abstains else best[0])
        assert row["probability"] == pytest.approx(weights[0 if abstains else 1], abs=SAME_PROBABILITY)


def test_a_causal_model_chooses_from_labels_or_writes(predict, folder):
    character_model(folder / "characters")
    line = predict("labels", "a good film", "--labels", "ham", "spam", "--top-k", 2, model="characters").text()
    answers = line.splitlines()[-1].split("  ")[0].split(", ")
    assert {answer.split()[0] for answer in answers} == {"ham", "spam"}
    assert sum(float(answer.split()[1]) for answer in answers) == pytest.approx(1, abs=2e-4)
    flags = ["--question", "Was it good?", "--context", "The film was good."]
    written = predict("written", *flags, model="characters").text().splitlines()[-1]
    assert "  no answer 0.0" in written


@pytest.mark.parametrize(
    ("model", "flags", "reason"),
    [
        ("run", [""], "text 1: empty text"),
        ("run", ["--question", "who", "--context", "me"], "this one gives labels"),
        ("span", ["a"], "give --question and --context"),
        ("../llama", ["a"], "name the labels that it chooses from"),
    ],
)
def test_bad_input_is_one_line(predict, model, flags, reason):
    assert reason in predict("refused", *flags, model=model, expect=2).refusal()


def test_a_column_that_is_taken_and_one_that_is_missing(predict, folder):
    path = folder / "taken.csv"
    path.write_text("text,prediction\na,b\n")
    flags = ["--file", path, "--output", folder / "never.csv"]
    assert "--prefix" in predict("taken", *flags, expect=2).refusal()
    assert (
        "no column for the texts, 'body'; found"
        in predict("column", *flags, "--text-column", "body", expect=2).refusal()
    )
    tab = predict("tab", *flags[:2], "--output", folder / "never.tsv", "--prefix", "a\tb", expect=2)
    assert "a tsv cannot hold a tab" in tab.refusal()
    assert not list(folder.glob("never*"))
    predict("prefix", *flags, "--prefix", "new_")
    assert list(read_csv(folder / "never.csv")[0]) == ["text", "prediction", "new_prediction", "new_probability"]
