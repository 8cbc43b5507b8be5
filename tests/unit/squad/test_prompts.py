"""Test a question's prompt: its text, how it is cut, and that its parts join to give the tokens of the whole."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tokenizers import processors

from zerotune.errors import Refused
from zerotune.models.pretrained import load_tokenizer
from zerotune.squad.files import read_questions
from zerotune.squad.prompts import (
    ABSTENTIONS,
    QuestionPrompt,
    QuestionTokenizer,
    SolvedQuestion,
    best_excerpt,
    draw_solved_questions,
    fit_solved_questions,
    one_line,
    question_prompt_record,
    read_answer,
    recorded_question_prompt,
    tokens_behind,
)
from zerotune.squad.questions import INSTRUCTION, NO_ANSWER, TEMPLATE, GoldAnswer, Paragraph, Question
from zerotune.tasks.cutting import token_ids

CONTEXT = "The tower at Hook Head was built in the 13th century."
QUESTION, ANSWER = "When was  the tower\n built? ", "in the 13th century"
SHARED = Path(__file__).resolve().parents[4] / "shared"
STORIES, DEV = SHARED / "models" / "stories260K", SHARED / "data" / "squad_v2" / "dev-v2.0.json.gz"
SHOT = SolvedQuestion("s", "The lamp is red.", "What is red?", "The lamp")
UNANSWERED = SolvedQuestion("t", "The door is blue.", "Who painted the door?", "")
# Like the templates of Gemma and Llama 3: contents are stripped, and a turn ends with a special token.
TURNS = (
    "<s>{% for turn in messages %}[{{ turn.role }}]\n\n{{ turn.content | trim }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# Like Qwen3's template: answers begin with an empty thought, which the generation prompt lacks.
THINKING = TURNS.replace(
    "{{ turn.content", "{{ '<think>\\n\\n</think>\\n\\n' if turn.role == 'assistant' }}{{ turn.content"
)


def tokenizer_with(template=None):
    """Return a tokenizer with one token for a full stop and a line break; byte-level ones spell it .Ċ."""
    tokenizer = byte_tokenizer(words=(".Ċ", " the", " tower"))
    tokenizer.chat_template = template
    return tokenizer


def parts_of(tokenizer, prompt, max_length=2000, num_positions=4000):
    return QuestionTokenizer(tokenizer, prompt, max_length, num_positions)


def whole(parts, context=CONTEXT, question=QUESTION, answer=ANSWER):
    joined = [parts.prefix, *parts.contexts([context]), *parts.questions([question]), *parts.answers([answer])]
    return [token for part in joined for token in part]


PLAIN = "Context: {}\nQuestion: {}\nAnswer:"
ASKED = PLAIN.format(CONTEXT, "When was the tower built?")
SOLVED = PLAIN.format(SHOT.context, SHOT.question), PLAIN.format(UNANSWERED.context, UNANSWERED.question)


@pytest.mark.parametrize(
    ("prompt", "template", "text"),
    [
        (QuestionPrompt(), None, f"<s>{INSTRUCTION}{ASKED} in the 13th century</s>"),
        (
            QuestionPrompt(shots=(SHOT, UNANSWERED)),
            None,
            f"<s>{INSTRUCTION}{SOLVED[0]} The lamp\n\n{SOLVED[1]} unanswerable\n\n{ASKED} in the 13th century</s>",
        ),
        (
            QuestionPrompt(chat=True),
            TURNS,
            f"<s>[user]\n\n{INSTRUCTION}{ASKED}<pad>\n[assistant]\n\nin the 13th century<pad>",
        ),
        (
            QuestionPrompt(chat=True),
            THINKING,
            f"<s>[user]\n\n{INSTRUCTION}{ASKED}<pad>\n[assistant]\n\n<think>\n\n</think>\n\nin the 13th century<pad>",
        ),
        (
            QuestionPrompt(chat=True, shots=(SHOT,)),
            TURNS,
            f"<s>[user]\n\n{INSTRUCTION}{SOLVED[0]}<pad>\n[assistant]\n\nThe lamp<pad>\n[user]\n\n{ASKED}<pad>\n"
            "[assistant]\n\nin the 13th century<pad>",
        ),
    ],
)
def test_a_prompt_reads_as_it_should_and_has_the_tokens_of_the_whole(prompt, template, text):
    tokenizer = tokenizer_with(template)
    row = whole(parts_of(tokenizer, prompt))
    assert tokenizer.decode(row) == text and row.count(tokenizer.bos_token_id) == 1
    assert row == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(".\n", add_special_tokens=False)["input_ids"][0] in row, "the full stop joins the line break"


@pytest.mark.skipif(
    not (STORIES.exists() and DEV.exists()), reason="needs stories260K and SQuAD v2's dev file in ../shared"
)
def test_a_real_tokenizers_parts_join_to_the_tokens_of_the_whole():
    tokenizer = load_tokenizer(str(STORIES), None)
    parts = parts_of(tokenizer, QuestionPrompt())
    questions = read_questions(DEV)[0][::100]
    assert len(questions) == 119
    for question in questions:
        answer = question.answers[0].text if question.answers else NO_ANSWER
        asked = TEMPLATE.format(context=question.paragraph.context, question=one_line(question.text))
        expected = token_ids(tokenizer, [f"{INSTRUCTION}{asked} {answer}"], True)[0] + [tokenizer.eos_token_id]
        assert whole(parts, question.paragraph.context, question.text, answer) == expected


def test_the_pinned_date_stands_in_a_chat_prompt():
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    parts = parts_of(tokenizer, QuestionPrompt(chat=True))
    assert tokenizer.decode(parts.prefix).startswith("<s>26 Jul 2024\n[user]Answer from the context")
    assert parts.end == [tokenizer.eos_token_id]


def test_no_answer_is_one_fixed_string():
    parts = parts_of(tokenizer_with(), QuestionPrompt())
    text = parts.tokenizer.decode(parts.answers(["", "  "])[1])
    assert text == " unanswerable</s>" and parts.answers([""]) == parts.answers(["unanswerable"])


def test_a_gold_answer_is_written_on_one_line_of_which_all_is_read():
    tokenizer, golds = tokenizer_with(), ["in the\n 13th\u2028century", "\n"]
    shots = tuple(replace(SHOT, answer=answer) for answer in golds)
    parts = parts_of(tokenizer, QuestionPrompt(shots=shots))
    written = [tokenizer.decode(row[: -len(parts.end)]) for row in parts.answers(golds)]
    assert [read_answer(text) for text in written] == ["in the 13th century", ""]
    assert all(f"Answer:{text}\n\n" in tokenizer.decode(parts.prefix) for text in written)


def test_a_text_behind_others_has_no_space_put_before_it():
    """A SentencePiece tokenizer puts a space before a text's first word: "Question" becomes " Question"."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    assert tokenizer.decode(tokens_behind(tokenizer, "\n", ["Question"])[0]) == "Question"
    assert tokenizer.decode(tokenizer("Question", add_special_tokens=False)["input_ids"]) == "_Question"


def test_a_token_that_would_reach_over_the_boundary_is_not_made():
    tokenizer = byte_tokenizer(words=("e:x",))
    assert tokens_behind(tokenizer, "e:", ["xy", "y"]) == [
        tokenizer("xy", add_special_tokens=False)["input_ids"],
        tokenizer("y", add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" in the 13th century", "in the 13th century"),
        ("\nFrance\n\nQuestion: what", "France"),
        (" Unanswerable.", ""),
        ("“", "“"),
        ('"No answer"', ""),
        ("N/A", ""),
        ("", ""),
        ("No answers were found", "No answers were found"),
    ],
)
def test_what_is_read_in_an_answer(text, answer):
    assert read_answer(text) == answer


def test_abstentions_are_written_as_they_are_compared():
    assert {read_answer(text) for text in ABSTENTIONS} == {""}


def test_the_record_gives_the_prompt_back():
    for chat in (False, True):
        record = question_prompt_record(QuestionPrompt(chat, (SHOT,)))
        assert recorded_question_prompt(record, "m") == QuestionPrompt(chat)
    with pytest.raises(Refused, match="another wording"):
        recorded_question_prompt({**record, "template": "{context} {question}"}, "m")


# --- excerpts ---


def excerpt_of(context, num_tokens, question="", held=None):
    offsets = [match.span() for match in re.finditer(r"\S", context)]  # one token per character
    start, stop = best_excerpt(context, offsets, num_tokens, question, held)
    return context[start:stop]


def test_the_excerpt_holds_the_rarest_of_the_questions_words():
    context = "the a the bb the cc the dd the lamp the ee the"
    assert "lamp" in excerpt_of(context, 7, "Where is the lamp?")
    assert excerpt_of(context, 4, "lamp") == "lamp"
    assert excerpt_of(context, 5, "DD") in ("dd the", "the dd")


def test_of_equal_excerpts_the_middle_one():
    assert excerpt_of("a b c d e f g h i", 3) == "d e f"
    assert excerpt_of("a b c d lamp f g h i", 6, "lamp") == "d lamp f", "two excerpts hold it with the most words"


def test_an_excerpt_has_whole_words_and_as_many_as_fit():
    context = "one two three four five six seven"
    for num_tokens in range(5, 28):
        found = excerpt_of(context, num_tokens, "six")
        assert f" {found} " in f" {context} " and len(found.replace(" ", "")) <= num_tokens
    assert excerpt_of(context, 27) == context
    assert excerpt_of("extraordinary", 5) == "extra", "not even one word"
    assert excerpt_of("aa lamp cc dd extraordinary", 6, "lamp") == "aa lamp", "a last word that fits no excerpt"


def test_text_without_spaces_is_cut_between_characters():
    """The characters of the question take the place of its words; the held answer is in the excerpt."""
    context = "塔建于公元一二四〇年由国王下令" + "他们在这里住了很久。" * 30
    found = excerpt_of(context, 20, "国王何时下令建塔")
    assert len(found) == 20 and "塔建于公元一二四〇年由国王下令" in found
    place = context.index("很久", 100)
    found = excerpt_of(context, 20, held=(place, place + 2))
    assert len(found) == 20 and found in context[place - 20 : place + 22] and "很久" in found
    link = "https://example.org/" + "a" * 100
    assert 20 <= len(excerpt_of(f"{link} {link}", 50)) <= 50


def test_the_held_characters_are_in_the_excerpt():
    context = "aa bb cc dd lamp lamp ee ff gg"
    place = context.index("bb")
    assert "bb" in excerpt_of(context, 6, "lamp", held=(place, place + 2))
    assert excerpt_of(context, 8, "lamp") == "lamp lamp"
    assert excerpt_of(context, 4, "lamp", held=(0, 29)) in ("lamp", "lamp"), "too long to be held"


def test_a_context_is_cut_to_its_row_and_nothing_else():
    parts = parts_of(tokenizer_with(), QuestionPrompt(), max_length=250)
    context = " ".join(f"word{number}" for number in range(100))
    others = len(parts.prefix) + len(parts.questions([QUESTION])[0]) + 30
    found = parts.fitted_context(context, "Where is word77?", others)
    assert others + len(found) <= 250 and "word77" in parts.tokenizer.decode(found)
    assert others + len(found) > 250 - 12, "a word more would not fit"
    with pytest.raises(
        Refused, match="the question 'Why' take 235 of 250 tokens and leave 15 for the context, wanted at least"
    ):
        parts.fitted_context(context, "Why", 235)


def test_shots_take_no_room_from_the_row():
    tokenizer = tokenizer_with()
    bare, shown = (parts_of(tokenizer, QuestionPrompt(shots=shots), 300) for shots in ((), (SHOT,)))
    assert shown.most - bare.most == len(shown.prefix) - len(bare.prefix) > 50
    assert parts_of(tokenizer, QuestionPrompt(shots=(SHOT,)), 300, num_positions=310).most == 310


# --- shots ---


def test_shots_are_of_several_paragraphs_and_half_without_an_answer():
    paragraphs = [Paragraph("T", number, f"context {number}") for number in range(20)]
    golds = (GoldAnswer("context", 0),)
    questions = [Question(f"{n}", "q", paragraphs[n // 2], () if n % 2 else golds) for n in range(40)]
    for num_shots in range(6):
        shots = draw_solved_questions(questions, num_shots, seed=1)
        assert len({shot.context for shot in shots}) == len(shots) == num_shots
        assert sum(shot.answer == "" for shot in shots) == num_shots // 2
    again, other = (draw_solved_questions(questions, 5, seed) for seed in (1, 2))
    assert shots == again != other
    with pytest.raises(Refused, match="--shots 50 needs 5 more paragraphs with a question with an answer"):
        draw_solved_questions(questions, 50, 1)


def test_long_shots_are_cut_to_excerpts_with_their_answers():
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    long = " ".join(["film"] * 200 + ["bright"] + ["film"] * 50)
    shots = (SolvedQuestion("a", long, "what", "bright"), SHOT)
    fitted, num_cut = fit_solved_questions(tokenizer, shots, num_positions=100)
    assert num_cut == 1 and fitted[1] == SHOT
    assert "bright" in fitted[0].context and len(fitted[0].context.split()) == 46
    assert fit_solved_questions(tokenizer, shots, num_positions=2000) == (shots, 0)
    unanswered = SolvedQuestion("b", long, "what is bright", "")
    assert "bright" in fit_solved_questions(tokenizer, (unanswered, SHOT), num_positions=100)[0][0].context
    with pytest.raises(Refused, match="--shots 2 do not fit"):
        fit_solved_questions(tokenizer, shots, num_positions=30)


def test_a_question_is_asked_behind_the_thought_that_a_template_opens_answers_with():
    parts = parts_of(tokenizer_with(THINKING), QuestionPrompt(chat=True))
    (asked,), (answer,) = parts.questions([QUESTION]), parts.answers(["red"])
    decode = parts.tokenizer.decode
    assert (
        decode(asked).endswith("Answer:<pad>\n[assistant]\n\n<think>\n\n</think>\n\n") and decode(answer) == "red<pad>"
    )


def test_a_tokenizer_that_adds_eos_adds_none_behind_the_prefix():
    tokenizer = tokenizer_with()
    wanted = parts_of(tokenizer, QuestionPrompt()).prefix
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert parts_of(tokenizer, QuestionPrompt()).prefix == wanted and wanted[-1] != tokenizer.eos_token_id
