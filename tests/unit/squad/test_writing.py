"""Answers written from a shared paragraph match a loop without padding, cache or sharing token for token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_reads import HostReads
from squad_cases import ALL, DATA, TOKENIZER, make_questions
from tiny_models import seeded_model

from zerotune.evaluation.generation import LARGEST_SHARE_OF_ROWS
from zerotune.squad.generation import encode_questions
from zerotune.squad.prompts import QuestionPrompt, SolvedQuestion, read_answer
from zerotune.squad.writing import first_line, greedy_writer, writing_scorer, writing_summary

CPU = torch.device("cpu")
NEW = 7
ALONE = replace(DATA, shares=False)
# sliding windows are shorter than all contexts
SHAPES = {"llama": {}, "mistral": {"sliding_window": 9}, "gemma2": {"sliding_window": 9}}
SHAPES["gemma3_text"] = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
SHOWN = QuestionPrompt(shots=(SolvedQuestion("s", "The door is blue.", "What is blue?", "The door"),))


def model_of(kind):
    return seeded_model(kind, 3, len(TOKENIZER), max_position_embeddings=512, **SHAPES[kind])


def one_by_one(model, data, number, ends):
    parts = data.prefix, data.contexts[data.context_of[number]], data.questions[number]
    row, written = [token for part in parts for token in part], []
    while len(written) < NEW:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([row + written]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("prompt", [QuestionPrompt(), SHOWN], ids=["no shots", "shots"])
@pytest.mark.parametrize("kind", SHAPES)
def test_answers_are_greedy_whatever_stands_beside_them(kind, prompt):
    model = model_of(kind)
    data = encode_questions(TOKENIZER, prompt, make_questions(), 400, 512, num_new_tokens=NEW)
    free = [one_by_one(model, data, number, []) for number in ALL]
    ends = [free[0][3], free[4][1]]  # some answers end early
    wanted = [one_by_one(model, data, number, ends) for number in ALL]
    records = [{"tokens": tokens} for tokens in wanted]
    write = greedy_writer(model, data, ends, NEW, CPU)
    assert write(ALL) == records
    assert write(ALL[[4, 0, 5]]) == [records[4], records[0], records[5]]
    assert [write(ALL[[number]])[0] for number in ALL] == records
    assert greedy_writer(model, replace(data, shares=False), ends, NEW, CPU)(ALL) == records
    assert greedy_writer(model, data, ends, NEW, CPU, in_step=True)(ALL) == records
    assert len(wanted[0]) <= 3


def count_passes(model, run):
    tokens = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return tokens


def test_a_paragraph_is_read_once_and_written_answers_stop():
    model = model_of("llama")
    write = greedy_writer(model, DATA, [], NEW, CPU)
    rows = ALL[[0, 2, 3]]
    shapes = count_passes(model, lambda: write(rows))
    prompt = len(DATA.contexts[0]) + sum(len(DATA.questions[number]) for number in rows)
    assert shapes == [(1, prompt)] + [(1, 3)] * (NEW - 1)
    ends = [one_by_one(model, DATA, number, [])[1] for number in rows]
    early, in_step = (greedy_writer(model, DATA, ends, NEW, CPU, in_step=each) for each in (False, True))
    assert len(count_passes(model, lambda: early(rows))) <= 2
    assert len(count_passes(model, lambda: in_step(rows))) == NEW


def test_answers_that_have_ended_leave_the_batch():
    """The fewer go on, the fewer columns a pass has, and once a quarter of the rows are done, the fewer rows."""
    model = model_of("llama")
    ends = [one_by_one(model, DATA, 0, [])[1]]
    lengths = np.array([len(one_by_one(model, DATA, number, ends)) for number in ALL])
    write = greedy_writer(model, DATA, ends, NEW, CPU)
    _, *passes = count_passes(model, lambda: write(ALL))
    num_rows = len(set(DATA.context_of))
    for step, (rows, columns) in enumerate(passes, start=1):
        goes_on = [DATA.context_of[number] for number in ALL if lengths[number] >= step]
        assert columns == max(goes_on.count(context) for context in goes_on)
        if len(set(goes_on)) <= LARGEST_SHARE_OF_ROWS * num_rows:
            num_rows = len(set(goes_on))
        assert rows == num_rows
    assert num_rows < len(set(DATA.context_of)) and len(passes) == min(lengths.max(), NEW - 1)


@pytest.mark.parametrize(("every", "most_reads"), [(1, NEW - 1), (4, 1), (NEW + 1, 0)])
def test_a_device_is_asked_for_the_end_every_few_tokens(every, most_reads, monkeypatch):
    """A GPU is asked after every eighth token: some tokens are written for nothing, but the answers are the same."""
    monkeypatch.setattr("zerotune.evaluation.generation.tokens_per_check", lambda device: every)
    model = model_of("llama")
    ends = [one_by_one(model, DATA, number, [])[1] for number in ALL[:2]]
    for given, rows in (([], ALL), (ends, ALL[:2])):
        write = greedy_writer(model, DATA, given, NEW, CPU)
        with HostReads() as reads:
            found = write(rows)
        assert found == [{"tokens": one_by_one(model, DATA, number, given)} for number in rows]
        assert reads.count == (most_reads if not given else min(most_reads, 1 if every > 1 else 2))


def test_a_model_whose_questions_cannot_share_a_row_writes_prompt_by_prompt(monkeypatch):
    model, rows = model_of("llama"), ALL[[4, 0, 2]]
    expected = writing_scorer(model, DATA, TOKENIZER, NEW, CPU)(rows)
    monkeypatch.setattr("zerotune.squad.writing.can_share", lambda *_: False)
    monkeypatch.delattr("zerotune.squad.writing.greedy_writer")
    assert writing_scorer(model, ALONE, TOKENIZER, NEW, CPU)(rows) == expected


def test_prompt_by_prompt_too_a_model_writes_in_the_runs_precision(monkeypatch):
    model, seen = model_of("llama"), []
    monkeypatch.setattr("zerotune.squad.writing.can_share", lambda *_: False)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for precision in ("bf16", "fp32"):
        writing_scorer(model, ALONE, TOKENIZER, NEW, CPU, precision)(ALL[:1])
        assert set(seen) == {precision == "bf16"}
        seen.clear()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The door\nQuestion: why", "The door"),
        ("\n\n  The door.\nWhy", "\n\n  The door."),  # `read_answer` skips blank lines
        ("The door", "The door"),
        ("no answer\n", "no answer"),
        ("\n \n", "\n \n"),
        ("", ""),
    ],
)
def test_an_answer_is_its_first_line(text, kept):
    """The cut answer reads the same, wherever the tokenizer puts the line break."""
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    cut = TOKENIZER.decode(first_line(TOKENIZER, tokens))
    assert cut.rstrip("\n") == kept.rstrip("\n")
    assert read_answer(cut) == read_answer(text)


def test_nothing_is_written_after_the_first_line(monkeypatch):
    """Also where ranks write in step, and the tokens after the line are dropped."""
    script = TOKENIZER("door\nwall wall wall wall wall", add_special_tokens=False)["input_ids"]
    steps = iter(())
    monkeypatch.setattr(
        "zerotune.evaluation.generation.likeliest_tokens",
        lambda model, hidden: torch.full((len(hidden),), next(steps)),
    )
    model, found, passes = model_of("llama"), [], []
    for in_step in (False, True):
        steps = iter(script)
        write = writing_scorer(model, DATA, TOKENIZER, len(script), CPU, in_step=in_step)
        passes.append(len(count_passes(model, lambda write=write: found.append(write(ALL[:2])))))
    assert found[0] == found[1] and [TOKENIZER.decode(each["tokens"]) for each in found[0]] == ["door"] * 2
    assert passes[0] < passes[1] == len(script)


def test_the_summary_by_hand():
    records = [{"tokens": tokens} for tokens in ([5, 6], [7, 8, 9], [], [4])]
    found = writing_summary(records, ["a", "b", "", ""], 3)
    assert found == {"eos_rate": 0.75, "mean_answer_tokens": 1.5, "abstention_share": 0.5}
