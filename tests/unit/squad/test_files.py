"""Test reading SQuAD's files: their contents, and one line for each way a file can be wrong."""

import copy
import gzip
import json
from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.squad import files as squad_files
from zerotune.squad.files import read_questions
from zerotune.squad.questions import GoldAnswer
from zerotune.tasks.files import Source

CONTEXT = "The tower at Hook Head – of 1240 – was built by monks."
REAL = Path(__file__).parents[4] / "shared" / "data" / "squad_v2"


def good():
    answerable = {
        "id": "q1",
        "question": " Who built the tower? ",
        "is_impossible": False,
        "answers": [{"text": "monks", "answer_start": 48}, {"text": "by monks", "answer_start": 45}],
    }
    impossible = {
        "id": "q2",
        "question": "Who burned it?",
        "is_impossible": True,
        "answers": [],
        "plausible_answers": [{"text": "monks", "answer_start": 48}],
    }
    other = {"id": "q3", "question": "What grows?", "answers": [{"text": "Kelp", "answer_start": 0}]}
    return {
        "version": "v2.0",
        "data": [
            {"title": "Towers", "paragraphs": [{"context": CONTEXT, "qas": [answerable, impossible]}]},
            {"title": "Kelp", "paragraphs": [{"context": "Kelp grows.", "qas": [other]}]},
        ],
    }


def written(folder, value, name="squad.json"):
    path = folder / name
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_questions_share_their_paragraph_and_have_all_answers(tmp_path, name):
    questions, record = read_questions(written(tmp_path, good(), name))
    first, second, third = questions
    assert first.paragraph is second.paragraph and first.paragraph is not third.paragraph
    assert [each.paragraph.number for each in questions] == [0, 0, 1]
    assert (first.paragraph.article, first.paragraph.context) == ("Towers", CONTEXT)
    assert first.text == "Who built the tower?"
    assert first.answers == (GoldAnswer("monks", 48), GoldAnswer("by monks", 45))
    assert second.answers == ()
    assert third.answers == (GoldAnswer("Kelp", 0),)
    assert record["rows"] == 3 and record["path"] == str(tmp_path / name)


def test_a_file_without_answers_is_read_and_says_so(tmp_path):
    value = good()
    for article in value["data"]:
        for qa in article["paragraphs"][0]["qas"]:
            qa.pop("answers")
    questions, _ = read_questions(written(tmp_path, value))
    assert [question.answers for question in questions] == [None, None, None]


def first_qa(value):
    return value["data"][0]["paragraphs"][0]["qas"][0]


def changed(change):
    value = good()
    change(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "is empty"),
        (b"{", "not JSON"),
        (b'{"data": "\xff"}', "byte 0xff at offset 10 is not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        ([1], "'data' is missing, wanted"),
        ({"data": []}, "holds no questions"),
        ({"data": {}}, "'data' is dict"),
        ({"data": [3]}, "article 0: not SQuAD's format: 'paragraphs' is missing"),
        (changed(lambda v: v["data"][1].pop("paragraphs")), "article 1: .*'paragraphs' is missing"),
        (changed(lambda v: v["data"][0]["paragraphs"][0].pop("context")), "paragraph 0: .*'context' is missing"),
        (changed(lambda v: v["data"][1]["paragraphs"][0].update(context=" ")), "context: empty text"),
        (changed(lambda v: v["data"][0].update(title=5)), "title: the text is int"),
        (changed(lambda v: first_qa(v).update(question="")), "question 'q1': empty text"),
        (changed(lambda v: first_qa(v).update(question="\ud800")), "half of a surrogate pair"),
        (changed(lambda v: first_qa(v).update(id=7)), "'id' is int"),
        (changed(lambda v: first_qa(v).update(id="q3")), "the id 'q3' occurs twice"),
        (changed(lambda v: first_qa(v).update(is_impossible="no")), "is_impossible is 'no', wanted true or false"),
        (changed(lambda v: first_qa(v).update(is_impossible=True)), "is_impossible is true, but it has 2 answers"),
        (changed(lambda v: first_qa(v).update(answers=[])), "is_impossible is false, but it has no answers"),
        (changed(lambda v: first_qa(v).pop("answers")), "'q1' lacks an answers field, as do 1 of 3"),
        (changed(lambda v: first_qa(v)["answers"][1].update(answer_start=50)), "answer_start 50 disagrees .*'nks.'"),
        (changed(lambda v: first_qa(v)["answers"][0].update(answer_start=-6)), "answer_start -6 disagrees"),
        (changed(lambda v: first_qa(v)["answers"][0].update(answer_start="48")), "answer_start is '48'"),
        (changed(lambda v: first_qa(v)["answers"][0].update(text="")), "an empty answer"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, value, message):
    with pytest.raises(Refused, match=message) as caught:
        read_questions(written(tmp_path, value))
    assert "\n" not in str(caught.value) and str(tmp_path / "squad.json") in str(caught.value)


def test_broken_gzip_is_refused(tmp_path):
    path = written(tmp_path, good(), "squad.json.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refused, match="broken gzip"):
        read_questions(path)


def hub_rows():
    empty = {"text": [], "answer_start": []}
    monks = {"text": ["monks", "by monks"], "answer_start": [48, 45]}
    towers = {"title": "Towers", "context": CONTEXT}
    return [
        {"id": "q1", "question": "Who built the tower?", "answers": monks, **towers},
        {"id": "q2", "question": "Who burned it?", "answers": empty, **towers},
        {"id": "q3", "title": "Kelp", "context": "Kelp grows.", "question": "What?", "answers": empty},
    ]


def test_rows_of_the_hub_are_the_same_questions(monkeypatch, tmp_path):
    monkeypatch.setattr(squad_files, "read_hub", lambda *_: Source("hub", hub_rows(), None, {"rows": 3}))
    questions, _ = squad_files.read_origin(squad_files.Origin("train", hub=("rajpurkar/squad_v2", "train", None)))
    of_file, _ = read_questions(written(tmp_path, good()))
    assert [(each.id, each.text, each.answers) for each in questions[:2]] == [
        (each.id, each.text, each.answers) for each in of_file[:2]
    ]
    assert questions[0].paragraph is questions[1].paragraph and questions[0].paragraph.context == CONTEXT
    assert (questions[2].paragraph.number, questions[2].answers) == (1, ())


@pytest.mark.parametrize("change", [lambda row: row.pop("title"), lambda row: row.update(title=None)])
def test_rows_and_articles_without_a_title(monkeypatch, tmp_path, change):
    """Each paragraph of the hub's rows is then its own article."""
    rows, value = copy.deepcopy(hub_rows()), good()
    for row in (*rows, *value["data"]):
        change(row)
    monkeypatch.setattr(squad_files, "read_hub", lambda *_: Source("hub", rows, None, {"rows": 3}))
    questions, _ = squad_files.read_origin(squad_files.Origin("train", hub=("any", "train", None)))
    assert [each.paragraph.article for each in questions] == ["article 0", "article 0", "article 1"]
    assert [each.paragraph.number for each in questions] == [0, 0, 1]
    of_file, _ = read_questions(written(tmp_path, value))
    assert {each.paragraph.article for each in of_file} == {f"article {number}" for number in range(len(value["data"]))}


def test_hub_rows_with_unequal_answers_are_refused(monkeypatch):
    rows = copy.deepcopy(hub_rows())
    rows[0]["answers"]["answer_start"].pop()
    monkeypatch.setattr(squad_files, "read_hub", lambda *_: Source("hub[train]", rows, None, {}))
    with pytest.raises(Refused, match="row 1: 2 answer texts but 1 answer_start"):
        squad_files.read_origin(squad_files.Origin("train", hub=("any", "train", None)))


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/squad_v2 beside the checkout")
@pytest.mark.parametrize(
    ("name", "num_questions", "num_answerable", "num_paragraphs", "num_articles"),
    [
        ("dev-v2.0.json.gz", 11_873, 5_928, 1_204, 35),
        ("train-v2.0.reconstructed.json.gz", 129_671, 86_821, 18_896, 442),
        ("train-v2.0.first10articles-official.json.gz", 4_719, 4_371, 694, 10),
    ],
)
def test_the_real_files_load(name, num_questions, num_answerable, num_paragraphs, num_articles):
    questions, _ = read_questions(REAL / name)
    paragraphs = {question.paragraph for question in questions}
    assert len(questions) == num_questions
    assert sum(bool(question.answers) for question in questions) == num_answerable
    assert len(paragraphs) == num_paragraphs
    assert len({paragraph.article for paragraph in paragraphs}) == num_articles
