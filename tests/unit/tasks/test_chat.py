"""Chat templates: where an answer begins, and which templates are refused, each in a line."""

import pytest
from tiny_models import CHAT_TEMPLATE, byte_tokenizer

from zerotune.errors import Refused
from zerotune.tasks.chat import answer_opening, assistant, render_chat, user

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
        # Qwen3-Thinking opens a thought in both, DeepSeek-R1 in the generation prompt only
        ("A:<think>\n\n</think>\n\n{{ turn.content }}", "<think>\n", ("\n</think>\n\n", "")),
        ("A:{{ turn.content }}", "<think>\n", ("\n</think>\n\n", "")),
        ("A:{{ turn.content }}", "<think>", ("\n\n</think>\n\n", "")),
        ("A:<thought>\n{{ turn.content }}", "", ("<thought>\n\n</thought>\n\n", "")),
    ],
)
def test_an_answer_begins_behind_what_the_template_opens_it_with(answer, asks, opening):
    template = QUESTION + "{% else %}" + answer + ASKS + "{{ '" + asks.replace("\n", "\\n") + "' }}{% endif %}"
    assert answer_opening(tokenizer_with(template)) == opening


def test_a_conversation_has_a_pinned_date():
    turns = [user("x"), assistant("y")]
    assert render_chat(tokenizer_with(CHAT_TEMPLATE), turns, asks=False) == "<s>26 Jul 2024\n[user]x\n[assistant]y\n"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ bos_token ", "fails with TemplateSyntaxError: unexpected end of template"),
        ("{{ raise_exception('system required') }}", "fails with TemplateError: system required"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        (
            "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
            "writes the question 0 times, wanted once",
        ),
        ("{% for m in messages %}{{ m.content * 3 }}{% endfor %}", "writes the question 3 times, wanted once"),
        ("{{ messages[0].content }}", "writes the answer 0 times, wanted once"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, problem):
    with pytest.raises(Refused, match=rf"the chat template of .* {problem}.*: use --prompt-format plain") as refused:
        answer_opening(tokenizer_with(template))
    assert "\n" not in str(refused.value)
