"""Chat templates: render conversations as text, and find where the model's answer begins.

A template is a program by the model's publisher. It runs only a few times, within limits, on placeholders that are then
replaced by the real texts. So a text is never changed, whatever its length, and no text can make a template run long.
"""

import re
from datetime import datetime
from functools import lru_cache

from transformers.utils import chat_template_utils

from zerotune.errors import Refused
from zerotune.run.bounded import OverLimit, call_bounded

# Templates print today's date: Llama-3's unless it is given one, Granite's by a function that transformers gives it.
# Scores must not depend on the day.
PINNED_DATE = "26 Jul 2024"
# A placeholder is as long as a long text and has characters that a template might escape. The vertical tabs at its ends
# show whether the template strips its input.
_PROBE = 'It\'s a "probe" <b>& {x} é.\n'
_REPEATS, _TURNS_AT_FULL_LENGTH = 4000, 10  # more turns have shorter placeholders, because the whole is limited
_EDGE = "\v"
MAX_CHARACTERS = 20_000_000
# In no template, as a label may be: "f" is a part of <end_of_turn>.
_QUESTION, _ANSWER = "the-question-asked", "the-answer-given"
_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(\s*)\Z")


class _PinnedDay(datetime):
    """A calendar that always shows PINNED_DATE."""

    @classmethod
    def now(cls, tz=None) -> datetime:
        """Return the pinned day."""
        return datetime(2024, 7, 26, tzinfo=tz)


def user(content: str) -> dict[str, str]:
    """Return the user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """Return the assistant's turn."""
    return {"role": "assistant", "content": content}


def render_chat(tokenizer, turns: list[dict[str, str]], asks: bool) -> str:
    """Return a conversation as the tokenizer's template writes it.

    Args:
        asks: whether to end with the opening of the assistant's next turn.
    Raises:
        Refused: the template fails, takes too long, or does not write each turn exactly once and unchanged.
    """
    around = _around_turns(tokenizer, str(tokenizer.chat_template), tuple(turn["role"] for turn in turns), asks)
    written = [
        (turn["content"].strip() if strips else turn["content"]) + after
        for turn, (strips, after) in zip(turns, around[1:], strict=True)
    ]
    return around[0][1] + "".join(written)


@lru_cache(maxsize=256)
def _around_turns(tokenizer, template: str, roles: tuple[str, ...], asks: bool) -> tuple[tuple[bool, str], ...]:
    """Return what a template writes before the first content and after each one, and whether it strips that content.

    Args:
        template: the tokenizer's own; a key of the cache, because it may be replaced later.
    """
    body = _PROBE * (_REPEATS * _TURNS_AT_FULL_LENGTH // max(_TURNS_AT_FULL_LENGTH, len(roles)))
    bodies = [f"{place}. {body}{place}." for place in range(len(roles))]
    turns = [{"role": role, "content": f"{_EDGE}{body}{_EDGE}"} for role, body in zip(roles, bodies, strict=True)]

    def render() -> str:
        chat_template_utils.datetime = _PinnedDay  # in the child process alone
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False, date_string=PINNED_DATE)
        if len(text) > MAX_CHARACTERS:
            raise OverLimit(f"writes {len(text):,} characters")
        return text

    try:
        text = call_bounded(render)
    except OverLimit as error:
        raise _unusable(tokenizer, str(error)) from error
    except Exception as error:  # a template may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _unusable(tokenizer, f"fails with {type(error).__name__}: {reason}") from error
    around, strips = [], False
    for role, body in zip(roles, bodies, strict=True):
        what = "answer" if role == "assistant" else "question"
        if body not in text:
            raise _unusable(tokenizer, f"changes or leaves out a part of the {what}")
        if (count := text.count(body)) > 1:
            raise _unusable(tokenizer, f"writes the {what} {count} times, wanted once")
    for body in bodies:
        before, found, text = text.partition(body)
        if not found:
            raise _unusable(tokenizer, "writes the turns of a conversation in another order")
        kept = before.endswith(_EDGE), text.startswith(_EDGE)
        around.append((strips, before.removesuffix(_EDGE)))
        strips, text = not all(kept), text.removeprefix(_EDGE)
    return *around, (strips, text)


def answer_opening(tokenizer) -> tuple[str, str]:
    """Return the text between a rendered question and its answer: the part to ask with, and the answer's spaces.

    Many templates open an answer with more than their generation prompt: Qwen3's with an empty thought. A model is
    asked, trained and scored after this opening. Its trailing spaces, such as Mistral's, belong to the answer's first
    token. If the generation prompt ends inside a thought, as DeepSeek-R1's does, the thought is closed.

    Raises:
        Refused: as `render_chat`.
    """
    asked = render_chat(tokenizer, [user(_QUESTION)], asks=True)
    answered = render_chat(tokenizer, [user(_QUESTION), assistant(_ANSWER)], asks=False)
    opening = answered[len(asked) : answered.rindex(_ANSWER)] if answered.startswith(asked) else ""
    before = opening.rstrip(" ")
    if thought := _OPEN_THOUGHT.search(asked + before):
        tag, space = thought.groups()
        return before + ("" if "\n" in space else "\n") + f"\n</{tag}>\n\n", ""
    return before, opening[len(before) :]


def around_question(tokenizer) -> tuple[str, bool, str]:
    """Return the text before a single question and that after it, up to where its answer begins.

    Between them: whether the template strips the question. Raises Refused as `render_chat`."""
    (_, before), (strips, after) = _around_turns(tokenizer, str(tokenizer.chat_template), ("user",), True)
    return before, strips, after + answer_opening(tokenizer)[0]


def answer_closing(tokenizer) -> str:
    """Return what the template writes after an answer. Raises Refused as `render_chat`."""
    return render_chat(tokenizer, [user(_QUESTION), assistant(_ANSWER)], asks=False).rpartition(_ANSWER)[2]


def _unusable(tokenizer, problem: str) -> Refused:
    return Refused(
        f"the chat template of {tokenizer.name_or_path} {problem}: use --prompt-format plain, or correct its "
        "chat_template"
    )
