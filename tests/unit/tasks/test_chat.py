"""Test chat templates: where an answer begins, and which templates are refused in one line."""

import pytest
from tiny_models import CHAT_TEMPLATE, byte_tokenizer

from zerotune.errors import Refused
from zerotune.run import bounded
from zerotune.tasks.chat import answer_opening, around_question, assistant, render_chat, user

QUESTION = "{% for turn in messages %}{% if turn.role == 'user' %}U:{{ turn.content }}\n"
ASKS = "{% endif %}{% endfor %}{% if add_generation_prompt %}A:"


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("answer", "asks", "opening"),
    [
        ("A:{{ turn.content }}", "", ("", "")),
        ("A: {{ turn.content }}", "", ("", " ")),
        ("A:<think>\n\n</think>\n\n{{ turn.content }}", "", ("<think>\n\n</think>\n\n", "")),  # Qwen3
        # Qwen3-Thinking opens a thought in both places, DeepSeek-R1 only in the generation prompt
        ("A:<think>\n\n</think>\n\n{{ turn.content }}", "<think>\n", ("\n</think>\n\n", "")),
        ("A:{{ turn.content }}", "<think>\n", ("\n</think>\n\n", "")),
        ("A:{{ turn.content }}", "<think>", ("\n\n</think>\n\n", "")),
        ("A:<thought>\n{{ turn.content }}", "", ("<thought>\n\n</thought>\n\n", "")),
    ],
)
def test_an_answer_begins_behind_what_the_template_opens_it_with(answer, asks, opening):
    template = QUESTION + "{% else %}" + answer + ASKS + "{{ '" + asks.replace("\n", "\\n") + "' }}{% endif %}"
    assert answer_opening(tokenizer_with(template)) == opening


def test_a_long_conversation_is_rendered_whole():
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    turns = [turn for number in range(200) for turn in (user(f"question {number}"), assistant(f"answer {number}"))]
    text = render_chat(tokenizer, [*turns, user("last")], asks=True)
    assert text.count("[user]question") == 200 and text.count("[assistant]answer") == 200


def test_a_conversation_has_a_pinned_date():
    turns = [user("x"), assistant("y")]
    assert render_chat(tokenizer_with(CHAT_TEMPLATE), turns, asks=False) == "<s>26 Jul 2024\n[user]x\n[assistant]y\n"
    asks_no_one = "{{ strftime_now('%B %d, %Y') }}{% for turn in messages %}[{{ turn.content }}]{% endfor %}"  # Granite
    assert render_chat(tokenizer_with(asks_no_one), turns, asks=False) == "July 26, 2024[x][y]"
    assert around_question(tokenizer_with(asks_no_one)) == ("July 26, 2024[", False, "][")  # an answer begins with [


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ bos_token ", "fails with TemplateSyntaxError: unexpected end of template"),
        ("{{ raise_exception('system required') }}", "fails with TemplateError: system required"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        (
            "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
            "changes or leaves out a part of the question",
        ),
        ("{% for m in messages %}{{ m.content * 3 }}{% endfor %}", "writes the question 3 times, wanted once"),
        ("{% for m in messages %}{{ m.content[:60] }}{% endfor %}", "changes or leaves out a part of the question"),
        ("{% for m in messages %}{{ m.content[:99999] }}{% endfor %}", "changes or leaves out a part of the question"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "changes or leaves out a part of the question"),
        (
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            "writes the turns .* in another order",
        ),
        ("{{ messages[0].content }}", "changes or leaves out a part of the answer"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, problem):
    with pytest.raises(Refused, match=rf"the chat template of .* {problem}.*: use --prompt-format plain") as refused:
        answer_opening(tokenizer_with(template))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 10 ** 9999999 ** 2 }}", "takes more than . s"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than . s"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' * 10 ** 10 }}", "takes more than 1 GiB"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' * 3 * 10 ** 7 }}", "writes 30,.* characters"),
    ],
)
def test_a_template_that_computes_without_end_is_refused(template, problem, monkeypatch):
    monkeypatch.setattr(bounded, "CPU_SECONDS", 1)
    with pytest.raises(Refused, match=rf"the chat template of .* {problem}.*: use --prompt-format plain"):
        answer_opening(tokenizer_with(template))


def test_a_text_stands_in_a_conversation_as_the_template_would_write_it():
    template = "{% for m in messages %}[{{ m.role }}]{{ CONTENT }}[/]{% endfor %}"
    turns = [user(" a film \n"), assistant("fine"), user("x" * 200_000)]
    for content in ("m.content", "m.content | trim"):
        tokenizer = tokenizer_with(template.replace("CONTENT", content))
        assert render_chat(tokenizer, turns, asks=False) == tokenizer.apply_chat_template(turns, tokenize=False)
