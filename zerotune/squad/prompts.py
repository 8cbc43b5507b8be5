"""The prompt of a question about a paragraph, in training and in evaluation: four parts, tokenised separately.

    prefix     [BOS] instruction, solved questions, "Context:"        the same for all questions
    context    " " context, line break                                the same for all questions about a paragraph
    question   "Question: " question, line break, "Answer:"
    answer     " " answer, end (only this is trained)

So the tokens of a context do not depend on the question, and many questions can share them. The parts are split where
tokenizers split anyway: before a space, and after a line break (which many merge with the full stop before it). Each
part is tokenised together with the characters before it, whose tokens are then dropped, because SentencePiece would put
a space before the first word of a text. In a chat template, the first three parts are the user's turn with the
template's text around it, and the end is the template's.

Only contexts are ever cut: to the excerpt that matches the question best (`best_excerpt`).
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.squad.questions import INSTRUCTION, NO_ANSWER, TEMPLATE, Question
from zerotune.tasks.chat import answer_opening, assistant, render_chat, user
from zerotune.tasks.cutting import shot_budget, token_ids, whole_texts
from zerotune.tasks.prompts import Prompt
from zerotune.training.generation import end_of_answer, line_break

# Read as "no answer", regardless of case and of quotes or stops around them. None is a gold answer of SQuAD v2.
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
# Scripts that are written without spaces (Thai, Lao, Burmese, Khmer, kana, Han): each character counts as a word.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
_LONGEST_PIECE = 20  # characters of a run without spaces that are kept or left out together
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,{_LONGEST_PIECE}}}")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_QUESTION_MARK, _CONTEXT_MARK = "\x02", "\x03"  # placeholders for the texts while a template is rendered
FEWEST_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class SolvedQuestion:
    """A solved example in the prompt (a "shot"). The answer "" means that there is none."""

    id: str
    context: str
    question: str
    answer: str

    @classmethod
    def of(cls, question: Question) -> "SolvedQuestion":
        """Solve a question with the first of its gold answers."""
        answer = question.answers[0].text if question.answers else ""
        return cls(question.id, question.paragraph.context, question.text, answer)


@dataclass(frozen=True)
class QuestionPrompt:
    """How questions are asked: in plain text or in the model's chat template, after any solved ones.

    Attributes:
        ends_with_line: a plain answer ends with a line break, as those of solved questions do, and not with the
            tokenizer's EOS, which only a tuned model has learnt to write.
    """

    chat: bool = False
    shots: tuple[SolvedQuestion, ...] = ()
    ends_with_line: bool = False

    @property
    def wording(self) -> Prompt:
        """Return the template without instruction and shots."""
        return Prompt(TEMPLATE, (NO_ANSWER,), self.chat)

    def parts(self, tokenizer) -> tuple[str, str, str, str]:
        """Return the fixed texts: before the context's space, before the question, after it, and the answer's space."""
        asked = self._rendered(tokenizer)
        prefix, _, rest = asked.partition(" " + _CONTEXT_MARK)
        before, _, after = rest.partition(_QUESTION_MARK)
        space = self.wording.answers(tokenizer)[0].removesuffix(NO_ANSWER)
        return prefix, before.removeprefix("\n"), after, space

    def _rendered(self, tokenizer) -> str:
        asked = TEMPLATE.format(context=_CONTEXT_MARK, question=_QUESTION_MARK)
        solved = [
            (TEMPLATE.format(context=shot.context, question=one_line(shot.question)), written_answer(shot.answer))
            for shot in self.shots
        ]
        if not self.chat:
            return INSTRUCTION + "".join(f"{text} {answer}\n\n" for text, answer in solved) + asked
        turns = [turn for text, answer in solved for turn in (user(text), assistant(answer))]
        turns.append(user(asked))
        turns[0] = user(INSTRUCTION + turns[0]["content"])
        return render_chat(tokenizer, turns, asks=True) + answer_opening(tokenizer)[0]


def question_prompt_record(prompt: QuestionPrompt) -> dict:
    """Return task.json's entries about a generator's prompt."""
    return {
        "instruction": INSTRUCTION,
        "template": TEMPLATE,
        "no_answer": NO_ANSWER,
        "format": "chat" if prompt.chat else "plain",
    }


def recorded_question_prompt(record: dict, model: str) -> QuestionPrompt:
    """Return the prompt that `question_prompt_record` described.

    Raises:
        Refused: this version words questions differently.
    """
    prompt = QuestionPrompt(record["format"] == "chat")
    if question_prompt_record(prompt) != record:
        raise Refused(
            f"{model} was tuned on another wording of its questions than this version of zerotune uses: evaluate it "
            "with the version that trained it (run.json names it)"
        )
    return prompt


def one_line(text: str) -> str:
    """Reduce white space to single spaces: one question of SQuAD v2 has hundreds in a row."""
    return " ".join(text.split())


def written_answer(text: str) -> str:
    """Return a gold answer as the model should write it: on one line, as `read_answer` reads no more."""
    return one_line(text) or NO_ANSWER


def read_answer(text: str) -> str:
    """Read the answer from what a model has written: its first line; "" for an abstention."""
    line = (text.strip().splitlines() or [""])[0].strip()
    return "" if line.casefold().strip("\"'*. ") in ABSTENTIONS else line


def has_first_line(text: str) -> bool:
    """Return whether a text has a line break after its first words, after which `read_answer` reads nothing."""
    return len((text.lstrip() + "x").splitlines()) > 1


def draw_solved_questions(questions: list[Question], num_shots: int, seed: int) -> tuple[SolvedQuestion, ...]:
    """Draw solved questions for a prompt, each about a different paragraph; half (rounded down) have no answer.

    Raises:
        Refused: there are too few.
    """
    chosen, seen = [], set()
    for has_answer, wanted in ((True, num_shots - num_shots // 2), (False, num_shots // 2)):
        order = random_order(len(questions), seed, f"shots with an answer: {has_answer}")
        candidates = (questions[index] for index in order if bool(questions[index].answers) == has_answer)
        for question in candidates:
            if wanted and question.paragraph.context not in seen:
                seen.add(question.paragraph.context)
                chosen.append(SolvedQuestion.of(question))
                wanted -= 1
        if wanted:
            kind = "with" if has_answer else "without"
            raise Refused(f"--shots {num_shots} needs {wanted} more paragraphs with a question {kind} an answer")
    return tuple(chosen[index] for index in random_order(num_shots, seed, "order of shots"))


def fit_solved_questions(
    tokenizer, shots: tuple[SolvedQuestion, ...], num_positions: int
) -> tuple[tuple[SolvedQuestion, ...], int]:
    """Cut the longest contexts, so that all contexts together take at most half of the model's positions.

    The kept part of a context holds the answer and matches the question best; all are cut to the same number of tokens.

    Returns:
        The shots, and how many of them were cut.
    Raises:
        Refused: fewer than cutting.FEWEST_SHOT_TOKENS would be left of a context.
    """
    backend = whole_texts(tokenizer)
    encoded = [backend.encode(shot.context, add_special_tokens=False) for shot in shots]
    budget = shot_budget([len(each.ids) for each in encoded], num_positions)
    fitted = []
    for shot, each in zip(shots, encoded, strict=True):
        place = shot.context.find(shot.answer)
        held = (place, place + len(shot.answer)) if shot.answer else None
        start, stop = best_excerpt(shot.context, each.offsets, budget, shot.question, held)
        fitted.append(replace(shot, context=shot.context[start:stop]) if len(each.ids) > budget else shot)
    return tuple(fitted), sum(before != after for before, after in zip(shots, fitted, strict=True))


def tokens_behind(tokenizer, anchor: str, texts: list[str]) -> list[list[int]]:
    """Tokenise texts as they are tokenised after the anchor, without special tokens.

    A text whose first token would include some of the anchor is tokenised on its own.
    """
    before = token_ids(tokenizer, [anchor], False)[0]
    rows = token_ids(tokenizer, [anchor + text for text in texts], False)
    joined = [index for index, row in enumerate(rows) if row[: len(before)] != before]
    found = [row[len(before) :] for row in rows]
    for index, row in zip(joined, token_ids(tokenizer, [texts[index] for index in joined], False), strict=True):
        found[index] = row
    return found


class QuestionTokenizer:
    """Turns contexts, questions and answers into the token ids of a prompt's parts.

    Args:
        max_length: most tokens of a whole row with its answer and end, not counting the solved questions.
        num_positions: number of the model's positions; no row is longer.
    """

    def __init__(self, tokenizer, prompt: QuestionPrompt, max_length: int, num_positions: int):
        self.tokenizer, self.prompt = tokenizer, prompt
        self._prefix, self._before, self._after, self._space = prompt.parts(tokenizer)
        bare = replace(prompt, shots=()).parts(tokenizer)[0]
        num_shot_tokens = len(self.prefix) - len(token_ids(tokenizer, [bare], not prompt.chat)[0])
        self.most = min(max_length + num_shot_tokens, num_positions)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokenise the common prefix of all prompts. A chat template writes its own BOS."""
        return token_ids(self.tokenizer, [self._prefix], not self.prompt.chat)[0]

    @cached_property
    def end(self) -> list[int]:
        """Return the token ids that end an answer. Raises Refused if the tokenizer has no end of text."""
        if self.prompt.ends_with_line:
            return line_break(self.tokenizer)
        return end_of_answer(self.tokenizer, self.prompt.wording)

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """Tokenise contexts, each with the line break after it."""
        return tokens_behind(self.tokenizer, self._prefix[-1:], [f" {text}\n" for text in texts])

    def questions(self, texts: list[str]) -> list[list[int]]:
        """Tokenise questions, up to where their answers begin."""
        asked = [f"{self._before}{one_line(text)}{self._after}" for text in texts]
        return tokens_behind(self.tokenizer, "\n", asked)

    def answers(self, texts: list[str]) -> list[list[int]]:
        """Tokenise answers with their end; "" means that there is none."""
        written = [self._space + written_answer(text) for text in texts]
        return [[*row, *self.end] for row in tokens_behind(self.tokenizer, self._after, written)]

    def fitted_context(
        self, context: str, question: str, num_others: int, held: tuple[int, int] | None = None
    ) -> list[int]:
        """Tokenise the best excerpt of a context that is too long for its row.

        Args:
            num_others: tokens of the row besides the context.
            held: characters [start, stop) that the excerpt must hold.
        Raises:
            Refused: there is no room for FEWEST_CONTEXT_TOKENS.
        """
        room = self.most - num_others
        if room < FEWEST_CONTEXT_TOKENS:
            raise Refused(
                f"prompt and answer of the question {one_line(question)[:40]!r} take {num_others} of {self.most} "
                f"tokens and leave {max(room, 0)} for the context, wanted at least {FEWEST_CONTEXT_TOKENS}: "
                "lower --max-new-tokens or --shots, or raise --max-length as far as the model's positions allow"
            )
        offsets = whole_texts(self.tokenizer).encode(context, add_special_tokens=False).offsets
        for spare in range(1, room):  # an excerpt on its own may have a few more tokens than inside the whole text
            start, stop = best_excerpt(context, offsets, room - spare, question, held)
            (found,) = self.contexts([context[start:stop]])
            if len(found) <= room:
                return found
        raise AssertionError("a single token fits")


def best_excerpt(
    context: str, offsets: list[tuple[int, int]], num_tokens: int, question: str, held: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Find the excerpt of whole words that matches a question best.

    Each occurrence of one of the question's words scores 1 / (its number of occurrences in the context): rare words
    count most, and no word counts more than 1. Of equally good excerpts the middle one is taken. Where words are not
    spaced, characters take their place, and a run without spaces is cut every _LONGEST_PIECE characters.

    Args:
        offsets: characters [start, stop) of the context's tokens.
        num_tokens: most tokens of an excerpt.
        held: characters that the excerpt must hold, if an excerpt of this length can.
    Returns:
        Characters [start, stop) of the context, at least one token.
    """
    words = [match.span() for match in _PIECE.finditer(context)]
    starts, stops = (np.array(side) for side in zip(*words, strict=True))
    token_starts, token_stops = (np.array(side) for side in zip(*offsets, strict=True))
    first_token = np.searchsorted(token_stops, starts, side="right")  # the first that ends after the word's start
    end_token = np.searchsorted(token_starts, stops, side="left")  # one after the last that begins in the word
    last_word = np.searchsorted(end_token, first_token + num_tokens, side="right")  # one after the excerpt's last
    asked = set(_WORD.findall(question.casefold()))
    found = [[word for word in _WORD.findall(context[a:b].casefold()) if word in asked] for a, b in words]
    counts = Counter(word for group in found for word in group)
    gains = np.concatenate([[0.0], np.cumsum([sum(1 / counts[word] for word in group) for group in found])])
    last_word = np.maximum(last_word, np.arange(len(words)))
    scores = np.round(gains[last_word] - gains[:-1], 9)
    if held is not None:
        holds = (starts <= held[0]) & (stops[np.maximum(last_word - 1, 0)] >= held[1])
        scores = np.where(holds, scores, -1.0) if holds.any() else scores
    reaches_end = np.flatnonzero(last_word == len(words))
    scores = scores[: reaches_end[0] + 1] if len(reaches_end) else scores  # later excerpts are parts of that one
    best = np.flatnonzero(scores == scores.max())
    chosen = int(best[(len(best) - 1) // 2])
    if last_word[chosen] > chosen:
        return int(starts[chosen]), int(stops[last_word[chosen] - 1])
    return int(starts[chosen]), int(token_stops[first_token[chosen] + num_tokens - 1])  # a part of one piece
