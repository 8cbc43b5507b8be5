"""Chat templates: conversations as text, and where in it the model's answer begins."""

import re

from zerotune.errors import Refused

# Llama-3's template prints today's date unless it is given one; scores must not depend on the day.
PINNED_DATE = "26 Jul 2024"
# Placeholders for a question and its answer while a template is examined; no template writes such words itself.
_QUESTION, _ANSWER = "the-question-asked", "the-answer-given"
_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(\s*)\Z")


def user(content: str) -> dict[str, str]:
    """Return the user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """Return the assistant's turn."""
    return {"role": "assistant", "content": content}


def render_chat(tokenizer, turns: list[dict[str, str]], asks: bool) -> str:
    """Return a conversation as the tokenizer's template writes it.

    Args:
        asks: end it where the assistant's next turn begins.
    Raises:
        Refused: the template fails.
    """
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False, date_string=PINNED_DATE)
    except Exception as error:  # a template is a program of the model's publisher: it may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _unusable(tokenizer, f"fails with {type(error).__name__}: {reason}") from error


def answer_opening(tokenizer) -> tuple[str, str]:
    """Return the text between a rendered question and its answer: the part to ask with, and the answer's spaces.

    Many templates open an answer with more than their generation prompt has: Qwen3's with an empty thought. A model is
    asked, trained and scored behind that. Spaces at its end, such as Mistral's, belong to the answer's first token.
    A generation prompt that ends inside a thought, as DeepSeek-R1's does, gets the thought's end.

    Raises:
        Refused: the template fails, or leaves out or repeats what it is given.
    """
    asked = render_chat(tokenizer, [user(_QUESTION)], asks=True)
    answered = render_chat(tokenizer, [user(_QUESTION), assistant(_ANSWER)], asks=False)
    for content, count in (("question", asked.count(_QUESTION)), ("answer", answered.count(_ANSWER))):
        if count != 1:
            raise _unusable(tokenizer, f"writes the {content} {count} times, wanted once")
    opening = answered[len(asked) : answered.index(_ANSWER)] if answered.startswith(asked) else ""
    before = opening.rstrip(" ")
    if thought := _OPEN_THOUGHT.search(asked + before):
        tag, space = thought.groups()
        return before + ("" if "\n" in space else "\n") + f"\n</{tag}>\n\n", ""
    return before, opening[len(before) :]


def _unusable(tokenizer, problem: str) -> Refused:
    return Refused(
        f"the chat template of {tokenizer.name_or_path} {problem}: use --prompt-format plain, or correct its "
        "chat_template"
    )
