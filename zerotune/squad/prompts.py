"""The wording of a question about a paragraph, as a generator is trained and evaluated on it, in four parts of tokens.

    head       [BOS] instruction, solved examples, "Context:"        the same for all questions
    context    " " context, line break                               the same for all questions of a paragraph
    question   "Question: " question, line break, "Answer:"
    answer     " " answer, end (what is trained)

The parts are tokenised apart and joined, so that a paragraph that many questions share has the same tokens as one that
stands before a single question. They part where tokenizers do so of themselves: before a space, and after a line break,
which many join to the full stop before it. Each part is tokenised behind the characters that precede it, whose tokens
are dropped: SentencePiece would put a space before the first word of a text. In a chat template the first three parts
are the user's turn with what the template puts around it, and the end is the template's.

Only contexts are ever cut, to a window of whole words (`best_window`).
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.squad.questions import INSTRUCTION, NO_ANSWER, TEMPLATE
from zerotune.tasks.cutting import shot_budget, token_ids
from zerotune.tasks.prompts import PINNED_DATE, Prompt
from zerotune.training.generation import end_of_answer

# Read as no answer too, in any case and without the full stop. No gold answer of SQuAD v2 is among them.
ABSTENTIONS = frozenset(
    {
        "",
        NO_ANSWER,
        "not answerable",
        "no answer",
        "n/a",
        "not specified",
        "not mentioned",
        "not given",
        "cannot be answered",
        "cannot be determined",
        "the context does not say",
        "i don't know",
    }
)
_QUESTION_MARK, _CONTEXT_MARK = "\x02", "\x03"  # stand for the texts while a template is rendered
FEWEST_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class SolvedQuestion:
    """An example that is shown before what is asked: "" is no answer."""

    id: str
    context: str
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionPrompt:
    """How questions are asked: in plain text or in the model's chat template, after some solved ones."""

    chat: bool = False
    shots: tuple[SolvedQuestion, ...] = ()

    @property
    def wording(self) -> Prompt:
        """The same without instruction and shots, for what needs the template alone."""
        return Prompt(TEMPLATE, (NO_ANSWER,), self.chat)

    def parts(self, tokenizer) -> tuple[str, str, str, str]:
        """The fixed texts: before the context's space, before the question, after it, and before the answer."""
        asked = self._rendered(tokenizer)
        head, _, rest = asked.partition(" " + _CONTEXT_MARK)
        before, _, after = rest.partition(_QUESTION_MARK)
        lead = self.wording.answers(tokenizer)[0].removesuffix(NO_ANSWER)
        return head, before.removeprefix("\n"), after, lead

    def _rendered(self, tokenizer) -> str:
        asked = TEMPLATE.format(context=_CONTEXT_MARK, question=_QUESTION_MARK)
        solved = [
            (TEMPLATE.format(context=shot.context, question=one_line(shot.question)), shot.answer or NO_ANSWER)
            for shot in self.shots
        ]
        if not self.chat:
            return INSTRUCTION + "".join(f"{text} {answer}\n\n" for text, answer in solved) + asked
        turns = []
        for text, answer in solved:
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": asked})
        turns[0] = {"role": "user", "content": INSTRUCTION + turns[0]["content"]}
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, date_string=PINNED_DATE)


def prompt_record(prompt: QuestionPrompt) -> dict:
    """What task.json says of a generator's prompt."""
    return {
        "instruction": INSTRUCTION,
        "template": TEMPLATE,
        "no_answer": NO_ANSWER,
        "format": "chat" if prompt.chat else "plain",
    }


def recorded_prompt(record: dict, model: str) -> QuestionPrompt:
    """The prompt that `prompt_record` described. Raises Refused where the wording is not today's."""
    prompt = QuestionPrompt(record["format"] == "chat")
    if prompt_record(prompt) != record:
        raise Refused(
            f"{model} was tuned on another wording of its questions than this zerotune asks: evaluate it with the "
            "version that trained it (run.json names it)"
        )
    return prompt


def one_line(question: str) -> str:
    """A question with single spaces: one of the train file's has hundreds in a row."""
    return " ".join(question.split())


def read_answer(text: str) -> str:
    """The answer that a model's words give: their first line, "" for an abstention."""
    line = (text.strip().splitlines() or [""])[0].strip()
    return "" if line.casefold().strip("\"'*. ") in ABSTENTIONS else line


def draw_shots(solved: list[SolvedQuestion], num_shots: int, seed: int) -> tuple[SolvedQuestion, ...]:
    """Solved examples for a prompt, each of another paragraph, by seed: as many without an answer as with one, or one
    fewer.

    Raises:
        Refused: there are too few.
    """
    chosen, seen = [], set()
    for has_answer, wanted in ((True, num_shots - num_shots // 2), (False, num_shots // 2)):
        order = random_order(len(solved), seed, f"shots with an answer: {has_answer}")
        candidates = (solved[index] for index in order if bool(solved[index].answer) == has_answer)
        for shot in candidates:
            if wanted and shot.context not in seen:
                seen.add(shot.context)
                chosen.append(shot)
                wanted -= 1
        if wanted:
            kind = "with" if has_answer else "without"
            raise Refused(f"--shots {num_shots} needs {wanted} more paragraphs with a question {kind} an answer")
    return tuple(chosen[index] for index in random_order(num_shots, seed, "order of shots"))


def fit_shots(tokenizer, shots: tuple[SolvedQuestion, ...], window: int) -> tuple[tuple[SolvedQuestion, ...], int]:
    """Shots whose contexts together take at most half of the model's window: of the longest, windows that hold the
    answer and match the question best, all of the same number of tokens.

    Returns:
        The shots, and how many were cut.
    Raises:
        Refused: they would be cut to fewer than cutting.FEWEST_SHOT_TOKENS.
    """
    encoded = [tokenizer.backend_tokenizer.encode(shot.context, add_special_tokens=False) for shot in shots]
    budget = shot_budget([len(each.ids) for each in encoded], window)
    fitted = []
    for shot, each in zip(shots, encoded, strict=True):
        place = shot.context.find(shot.answer)
        held = (place, place + len(shot.answer)) if shot.answer else None
        start, stop = best_window(shot.context, each.offsets, budget, shot.question, held)
        fitted.append(replace(shot, context=shot.context[start:stop]) if len(each.ids) > budget else shot)
    return tuple(fitted), sum(before != after for before, after in zip(shots, fitted, strict=True))


def tokens_behind(tokenizer, anchor: str, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as they are behind other characters, none of them special.

    A text whose first token would reach into the anchor is tokenised on its own.
    """
    before = token_ids(tokenizer, [anchor], False)[0]
    rows = token_ids(tokenizer, [anchor + text for text in texts], False)
    joined = [index for index, row in enumerate(rows) if row[: len(before)] != before]
    found = [row[len(before) :] for row in rows]
    for index, row in zip(joined, token_ids(tokenizer, [texts[index] for index in joined], False), strict=True):
        found[index] = row
    return found


class QuestionTokenizer:
    """Turns contexts, questions and answers into the parts of a prompt.

    Args:
        max_length: most tokens of a whole row, its answer and the end included and the solved examples left out.
        window: the model's positions; no row is longer.
    """

    def __init__(self, tokenizer, prompt: QuestionPrompt, max_length: int, window: int):
        self.tokenizer, self.prompt = tokenizer, prompt
        self._head, self._before, self._after, self._lead = prompt.parts(tokenizer)
        bare = replace(prompt, shots=()).parts(tokenizer)[0]
        num_shot_tokens = len(self.head) - len(token_ids(tokenizer, [bare], not prompt.chat)[0])
        self.most = min(max_length + num_shot_tokens, window)

    @cached_property
    def head(self) -> list[int]:
        """Token ids of what all prompts begin with; a chat template writes its own BOS."""
        return token_ids(self.tokenizer, [self._head], not self.prompt.chat)[0]

    @cached_property
    def end(self) -> list[int]:
        """Token ids that end an answer. Raises Refused for a tokenizer without an end of text."""
        return end_of_answer(self.tokenizer, self.prompt.wording)

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of contexts, each with the line break behind it."""
        return tokens_behind(self.tokenizer, self._head[-1:], [f" {text}\n" for text in texts])

    def questions(self, texts: list[str]) -> list[list[int]]:
        """Token ids of questions up to where their answers begin."""
        asked = [f"{self._before}{one_line(text)}{self._after}" for text in texts]
        return tokens_behind(self.tokenizer, "\n", asked)

    def answers(self, texts: list[str]) -> list[list[int]]:
        """Token ids of answers ("": none) with their end."""
        written = [self._lead + (text.strip() or NO_ANSWER) for text in texts]
        return [[*row, *self.end] for row in tokens_behind(self.tokenizer, self._after, written)]

    def fitted_context(
        self, context: str, question: str, num_others: int, held: tuple[int, int] | None = None
    ) -> list[int]:
        """Token ids of the best window of a context that is too long for its row.

        Args:
            num_others: tokens of the row that are not the context's.
            held: characters [start, stop) that the window must hold.
        Raises:
            Refused: there is no room for FEWEST_CONTEXT_TOKENS.
        """
        room = self.most - num_others
        if room < FEWEST_CONTEXT_TOKENS:
            raise Refused(
                f"rows of {self.most} tokens leave the context of the question {one_line(question)[:40]!r} "
                f"{max(room, 0)} beside {num_others} of prompt and answer, wanted {FEWEST_CONTEXT_TOKENS} or more: "
                "lower --max-new-tokens or --shots, or raise --max-length as far as the model's window goes"
            )
        backend = self.tokenizer.backend_tokenizer
        offsets = backend.encode(context, add_special_tokens=False).offsets
        for spare in range(1, room):  # a window's own tokens may be some more than it has in the whole text
            start, stop = best_window(context, offsets, room - spare, question, held)
            (found,) = self.contexts([context[start:stop]])
            if len(found) <= room:
                return found
        raise AssertionError("an empty context fits")


def best_window(
    context: str, offsets: list[tuple[int, int]], num_tokens: int, question: str, held: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The window of whole words that matches a question best.

    A window's score is the sum, over the question's words in it, of one over how often the word stands in the context:
    rare words count most, and each word 1 at the utmost. Of equally good windows the one in the middle.

    Args:
        offsets: characters [start, stop) of the context's tokens.
        num_tokens: most tokens of a window.
        held: characters that the window holds, where one so long can.
    Returns:
        Characters [start, stop) of the context.
    """
    words = [match.span() for match in re.finditer(r"\S+", context)]
    starts, stops = (np.array(side) for side in zip(*words, strict=True))
    token_starts, token_stops = (np.array(side) for side in zip(*offsets, strict=True))
    first_token = np.searchsorted(token_stops, starts, side="right")  # the first that ends after a word's start
    end_token = np.searchsorted(token_starts, stops, side="left")  # one behind the last that begins before its stop
    last_word = np.searchsorted(end_token, first_token + num_tokens, side="right")  # one behind a window's last word
    asked = set(re.findall(r"\w+", question.casefold()))
    found = [[word for word in re.findall(r"\w+", context[a:b].casefold()) if word in asked] for a, b in words]
    counts = Counter(word for group in found for word in group)
    gains = np.concatenate([[0.0], np.cumsum([sum(1 / counts[word] for word in group) for group in found])])
    last_word = np.maximum(last_word, np.arange(len(words)))
    scores = np.round(gains[last_word] - gains[:-1], 9)
    if held is not None:
        holds = (starts <= held[0]) & (stops[np.maximum(last_word - 1, 0)] >= held[1])
        scores = np.where(holds, scores, -1.0) if holds.any() else scores
    reaches_end = np.flatnonzero(last_word == len(words))
    scores = scores[: reaches_end[0] + 1] if len(reaches_end) else scores  # later windows are parts of that one
    best = np.flatnonzero(scores == scores.max())
    chosen = int(best[(len(best) - 1) // 2])
    fits = last_word[chosen] > chosen
    return int(starts[chosen]), int(stops[last_word[chosen] - 1] if fits else starts[chosen])
