"""Questions that share paragraphs have the loss and gradients of one question per row; test the loop's batches too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from squad_cases import ALL, ASKED, CONTEXTS, DATA, PLAIN, TOKENIZER, make_questions
from tiny_models import seeded_model
from torch.nn import functional

from zerotune.errors import Refused
from zerotune.models.generator import TextGenerator
from zerotune.squad.generation import encode_questions
from zerotune.squad.prompts import QuestionPrompt, SolvedQuestion

CPU = torch.device("cpu")
SHAPES = {"llama": {}, "mistral": {"sliding_window": 40}, "gemma2": {"sliding_window": 30}}


ALONE = replace(DATA, shares=False)


def model_of(kind="llama"):
    return TextGenerator(seeded_model(kind, 3, len(TOKENIZER), max_position_embeddings=512, **SHAPES[kind]))


def loss_sum(data, model, rows):
    batch = data.batch(rows, CPU)
    return functional.cross_entropy(model(**batch.inputs), batch.targets, reduction="sum")


def loss_and_gradients(data, micro_batches, model):
    model.zero_grad()
    total = 0.0
    for rows in micro_batches:
        loss = loss_sum(data, model, rows) / data.num_targets(np.concatenate(micro_batches))
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- tokens ---


def row_of(data, number):
    parts = data.prefix, data.contexts[data.context_of[number]], data.questions[number], data.answers[number]
    return [token for part in parts for token in part]


def test_a_questions_row_is_its_prompt_and_its_answer():
    for number, (place, text, answer) in enumerate(ASKED):
        wanted = f"Context: {CONTEXTS[place]}\nQuestion: {text}\nAnswer: {answer or 'unanswerable'}</s>"
        assert TOKENIZER.decode(row_of(DATA, number)).endswith(wanted)
    assert len(DATA.contexts) == 3 and DATA.context_of.tolist() == [0, 1, 0, 0, 2, 1]
    assert DATA.lengths.tolist() == [len(row_of(DATA, number)) - 1 for number in ALL]
    assert DATA.num_truncated == 0 and DATA.ids[3] == "q-3"
    assert set(DATA.token_ids) == {token for number in ALL for token in row_of(DATA, number)}


def test_counts():
    shared = sum(len(context) + len(DATA.prefix) for context in DATA.contexts)
    own = sum(len(DATA.questions[number]) + len(DATA.answers[number]) - 1 for number in ALL)
    assert DATA.num_tokens(ALL) == shared + own and ALONE.num_tokens(ALL) == DATA.lengths.sum()
    assert ALONE.num_padded_tokens(ALL) == 6 * DATA.lengths.max()
    assert DATA.num_targets(ALL) == sum(map(len, DATA.answers))


# --- loss ---


@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_are_those_of_one_question_a_row(kind):
    model = model_of(kind)
    alone, expected = loss_and_gradients(ALONE, [ALL], model)
    for cut in ([ALL], [ALL[[4, 2]], ALL[[0, 1, 3]], ALL[[5]]]):
        shared, found = loss_and_gradients(DATA, cut, model)
        # float32 sums in another order
        assert shared == pytest.approx(alone, rel=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_that_of_transformers_with_the_prompt_masked():
    model = model_of()
    total = 0.0
    for number in ALL:
        row, count = row_of(DATA, number), len(DATA.answers[number])
        labels = torch.tensor([[-100] * (len(row) - count) + row[-count:]])
        stock = model.stock_model
        total += float(stock(torch.tensor([row]), labels=labels, use_cache=False).loss.detach()) * count
    assert float(loss_sum(DATA, model, ALL).detach()) == pytest.approx(total, rel=1e-5)


def test_scores_are_in_the_order_asked_for_and_give_the_mean_loss():
    model = model_of()
    with torch.no_grad():
        scores = DATA.scores(model, ALL, CPU)
        mixed = DATA.scores(model, ALL[[5, 0, 4]], CPU)
        one = [DATA.scores(model, ALL[[number]], CPU)[0] for number in ALL]
    losses, of_mixed, of_one = ([record["loss"] for record in records] for records in (scores, mixed, one))
    np.testing.assert_allclose(losses, of_one, rtol=1e-5)
    np.testing.assert_allclose(of_mixed, [losses[number] for number in (5, 0, 4)], rtol=1e-5)
    assert DATA.mean_loss(scores) == pytest.approx(loss_and_gradients(DATA, [ALL], model)[0], rel=1e-5)


# --- cuts ---


LONG = " ".join(f"word{number}" for number in range(60))


def test_only_contexts_that_do_not_fit_are_cut_and_not_shared():
    asked = [
        (0, "Where is word33?", "word9"),
        (0, "Where is word5?", None),
        (1, "What is red?", "lamp"),
        (0, "a" * 90, "word2"),
    ]
    questions = make_questions(asked, [LONG, *CONTEXTS[1:]])
    prefix = len(encode_questions(TOKENIZER, PLAIN, questions, 2000, 2000).prefix)
    most = prefix + len(LONG) + 70
    data = encode_questions(TOKENIZER, PLAIN, questions, most, 2000)
    assert data.num_truncated == 1 and data.context_of.tolist() == [0, 0, 1, 2]
    assert max(len(row_of(data, number)) for number in range(4)) <= most
    cut = encode_questions(TOKENIZER, PLAIN, questions[:3], 260, 2000)
    assert cut.num_truncated == 2 and len(set(cut.context_of)) == 3 and len(cut.contexts) == 3
    texts = [TOKENIZER.decode(context) for context in cut.contexts]
    assert " word9 " in texts[cut.context_of[0]] and " word5 " in texts[cut.context_of[1]]
    assert all(len(row_of(cut, number)) <= 260 for number in range(3))
    assert all(len(row_of(encode_questions(TOKENIZER, PLAIN, questions[:3], 400, 260), n)) <= 260 for n in range(3))


def test_an_evaluation_does_not_look_at_the_answer_and_keeps_room_to_write():
    (question,) = make_questions([(0, "Where is word33?", "word9")], [LONG])
    data = encode_questions(TOKENIZER, PLAIN, [question], 260, 2000, num_new_tokens=40)
    text = TOKENIZER.decode(data.contexts[0])
    assert " word33 " in text and " word9 " not in text
    assert len(data.prefix) + len(data.contexts[0]) + len(data.questions[0]) <= 220


def test_a_row_without_room_for_a_context_is_refused():
    with pytest.raises(Refused, match="lower --max-new-tokens or --shots, or raise --max-length"):
        encode_questions(TOKENIZER, PLAIN, make_questions(), 120, 2000)


def test_questions_whose_answers_nobody_knows_have_none():
    questions = [replace(question, answers=None) for question in make_questions()]
    data = encode_questions(TOKENIZER, PLAIN, questions, 400, 512, num_new_tokens=10)
    assert data.num_answer_tokens.tolist() == [0] * len(ASKED)
    batches = data.writing_batches(300)
    assert sorted(np.concatenate(batches).tolist()) == ALL.tolist() and len(batches) > 1


def test_the_shape_of_a_batch_that_is_written():
    prompts = [len(DATA.questions[number]) for number in ALL]
    longest = len(DATA.contexts[0]) + sum(prompts[number] for number in (0, 2, 3))
    assert DATA.writing_shape(ALL, 10) == (3, longest, 30)
    assert ALONE.writing_shape(ALL[[1, 5]], 10) == (2, len(DATA.contexts[1]) + max(prompts[1], prompts[5]), 10)


def test_a_prompt_that_is_written_alone_costs_its_whole_length():
    assert ALONE.prompt_groups.row_length(ALL[:1]) == len(ALONE.prompt_tokens(0))
    assert DATA.prompt_groups.row_length(ALL[:1]) < len(DATA.prompt_tokens(0))


def test_shots_are_part_of_the_prefix():
    prompt = QuestionPrompt(shots=(SolvedQuestion("s", "The door is blue.", "What is blue?", "The door"),))
    data = encode_questions(TOKENIZER, prompt, make_questions(), 400, 512, num_new_tokens=10)
    assert "What is blue?\nAnswer: The door\n\nContext:" in TOKENIZER.decode(data.prefix)
    assert data.contexts == DATA.contexts and data.prompt_groups.shared[0] == len(data.prefix) // 8 + len(
        data.contexts[0]
    )


def test_the_loops_batches_are_the_groups_own():
    steps = DATA.epoch_steps(4, seed=0, epoch=0)
    assert sorted(map(len, steps)) == [2, 4]
    micro = DATA.micro_batches(ALL, 400, 2)
    assert sorted(np.concatenate([batch for rank in micro for batch in rank]).tolist()) == ALL.tolist()
    assert sorted(np.concatenate(DATA.loss_batches(300)).tolist()) == ALL.tolist()
