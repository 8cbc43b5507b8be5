"""Classify with a causal model without a head: prompts, and the likelihood of the label words after them."""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, permutations

import numpy as np
import torch

from zerotune.errors import Refused
from zerotune.models.device import to_device
from zerotune.models.generator import answer_log_likelihoods, answer_logits
from zerotune.models.shared_prefix import SharedPrefix, SharedRows, shared_prefix
from zerotune.randomness import random_order
from zerotune.settings.names import short_name
from zerotune.tasks.chat import answer_opening, assistant, render_chat, user
from zerotune.tasks.cutting import cut_texts, token_ids

CHAT_NAMES = re.compile(r"(^|[-_./])(it|chat|instruct)($|[-_./])", re.IGNORECASE)
# Zhao et al. 2021 (arXiv:2102.09690), section 5: three content-free inputs.
CONTENT_FREE_TEXTS = ("N/A", "[MASK]", "")
# Texts tokenised at once: a tokenizer's own object for a prompt takes about a hundred bytes per token.
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Prompt:
    """How a model is asked for the label of a text.

    Attributes:
        template: the wording for one text, with `{text}`.
        label_words: a word for each label, in label order.
        chat: whether to use the tokenizer's chat template.
        shots: solved examples, each a text and its label.
        instruction: appears once, at the beginning.
    """

    template: str
    label_words: tuple[str, ...]
    chat: bool = False
    shots: tuple[tuple[str, int], ...] = ()
    instruction: str = ""

    def render(self, tokenizer, text: str) -> str:
        """Return everything before the answer, as `render_all` does for several texts."""
        return self.render_all(tokenizer, [text])[0]

    def render_all(self, tokenizer, texts: list[str]) -> list[str]:
        """Return everything before the answer, for each text.

        Raises:
            Refused: the tokenizer's chat template cannot be used.
        """
        if not self.chat:
            solved = "".join(f"{self._asked(shot)} {self.label_words[label]}\n\n" for shot, label in self.shots)
            return [self._opening + solved + self._asked(text) for text in texts]
        opening, _ = answer_opening(tokenizer)
        return [render_chat(tokenizer, self._turns(text), asks=True) + opening for text in texts]

    @property
    def _opening(self) -> str:
        return f"{self.instruction}\n\n" if self.instruction else ""

    def _turns(self, text: str) -> list[dict[str, str]]:
        """Return the turns of a conversation; its first question begins with the instruction."""
        asked = [self._asked(each) for each in (*(shot for shot, _ in self.shots), text)]
        asked[0] = self._opening + asked[0]
        answers = [assistant(self.label_words[label]) for _, label in self.shots]
        return [*chain.from_iterable(zip(map(user, asked), answers, strict=False)), user(asked[-1])]

    def _asked(self, text: str) -> str:
        return self.template.replace("{text}", text)

    def answers(self, tokenizer) -> list[str]:
        """Return the label words as they follow the prompt: after a space in plain text, else as in the chat template.

        Raises:
            Refused: as `render_all`.
        """
        space = answer_opening(tokenizer)[1] if self.chat else " "
        return [space + word for word in self.label_words]


def uses_chat(wanted: str, tokenizer, name: str) -> bool:
    """Return whether prompts use the chat template, by --prompt-format; "auto" goes by the model's name.

    Raises:
        Refused: chat is asked for without a template, or the template cannot be used.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if wanted == "chat" and not has_template:
        raise Refused(f"--prompt-format chat: the tokenizer of {name} has no chat template: use --prompt-format plain")
    chat = has_template and (wanted == "chat" or (wanted == "auto" and bool(CHAT_NAMES.search(short_name(name)))))
    if chat:
        answer_opening(tokenizer)  # checks the template
    return chat


@dataclass(frozen=True)
class PromptData:
    """Prompts with their possible answers, tokenised.

    An item has one row when every answer is a single token, else one row per label.

    Attributes:
        rows: token ids of each row, without the answer's last token, [num_items × rows_per_item].
        targets: answer tokens of each row: one for each label if answers are single tokens, else the row's answer.
        num_shared: number of tokens that all rows begin with: shots, and the prompt up to the text.
        num_truncated: number of items whose text was cut to fit.
    """

    rows: SharedRows
    targets: list[list[int]]
    num_labels: int
    single_token: bool
    pad_id: int
    num_shared: int
    num_truncated: int

    @property
    def rows_per_item(self) -> int:
        """Return 1, or the number of labels."""
        return 1 if self.single_token else self.num_labels

    @property
    def lengths(self) -> np.ndarray:
        """Return the cost of each item in tokens, [num_items]: its rows, padded, without the shared tokens."""
        counts = self.rows.lengths.reshape(-1, self.rows_per_item)
        return (counts.max(axis=1) - self.num_shared) * self.rows_per_item

    def context(self, item: int) -> list[int]:
        """Return the token ids of an item's prompt without an answer."""
        row = self.rows[item * self.rows_per_item]
        return row[: len(row) - self._num_answer(item)].tolist()

    def _num_answer(self, item: int) -> int:
        """Return how many answer tokens an item's first row has."""
        return 0 if self.single_token else len(self.targets[item * self.rows_per_item]) - 1

    @property
    def context_lengths(self) -> np.ndarray:
        """Return the tokens of each item's prompt, shared ones included, [num_items]."""
        lengths = self.rows.lengths[:: self.rows_per_item]
        return lengths - np.array([self._num_answer(item) for item in range(len(lengths))])

    def longest_own(self, items: np.ndarray) -> int:
        """Return the number of tokens in the longest row of some items, without the shared ones."""
        size, rows = self.rows_per_item, self.rows
        longest = max(len(rows.tails[item * size + label]) for item in items for label in range(size))
        return len(rows.head) + longest - self.num_shared

    def prefix(self, model, device: torch.device) -> SharedPrefix | None:
        """Return the keys and values of the shared tokens, for `log_likelihoods`; None if nothing can be shared."""
        return shared_prefix(model, self.rows[0][: self.num_shared], device)

    def log_likelihoods(
        self, model, items: np.ndarray, device: torch.device, prefix: SharedPrefix | None = None
    ) -> np.ndarray:
        """Return the log-probability of each answer, up to a constant per item: float32 [items, num_labels].

        Logits are computed for answers only.

        Args:
            prefix: from `prefix`; None computes every row from its first token, with the model's own attention.
        """
        size = self.rows_per_item
        numbers = [item * size + offset for item in items.tolist() for offset in range(size)]
        counts = np.array([1 if self.single_token else len(self.targets[number]) for number in numbers])
        if prefix is None:
            hidden = self._hidden_of_whole([self.rows[number] for number in numbers], counts, model, device)
        else:
            rows = [self.rows.after(prefix.num_tokens, number) for number in numbers]
            hidden = prefix.hidden(model, rows, counts, device)
        if self.single_token:
            # the label words' logits are enough: their log softmax over the labels is the same
            return answer_logits(model, hidden, self.targets[0]).cpu().numpy()
        targets = np.fromiter(chain.from_iterable(self.targets[number] for number in numbers), np.int64)
        found = answer_log_likelihoods(model, hidden, to_device(targets, device)).cpu().numpy()
        return np.add.reduceat(found, np.cumsum(counts) - counts).reshape(len(items), self.num_labels)

    def _hidden_of_whole(self, rows: list[array], counts: np.ndarray, model, device: torch.device) -> torch.Tensor:
        """Return the last hidden states of each row's last `counts` tokens: [counts.sum(), dim].

        Rows are padded on the right, where no token of a causal model looks, so they need no mask.
        """
        lengths = np.array([len(row) for row in rows])
        columns = np.arange(lengths.max())
        input_ids = np.full((len(rows), len(columns)), self.pad_id, dtype=np.int64)
        input_ids[columns < lengths[:, None]] = np.concatenate(rows)
        asked = np.flatnonzero((columns < lengths[:, None]) & (columns >= (lengths - counts)[:, None]))
        hidden = model.base_model(input_ids=to_device(input_ids, device), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[to_device(asked, device)]


def answers_overlap(tokenizer, prompt: Prompt) -> bool:
    """Return whether the tokens of one label word begin those of another, as "art" begins "art history".

    The likelihood of the shorter one then includes that of the longer one, so they must be compared with their ends.
    """
    contexts, wholes = _tokenise(tokenizer, prompt, [""])
    answers = _answers_behind(tokenizer, prompt, contexts[0], wholes[0])
    return any(longer[: len(shorter)] == shorter for shorter, longer in permutations(answers, 2))


def encode_prompts(
    tokenizer, prompt: Prompt, texts: list[str], max_text_tokens: int, window: int, end: Sequence[int] = ()
) -> PromptData:
    """Tokenise prompts and answers. Long texts lose their middle until all fits; shots and the template are kept.

    An answer's tokens are those that the whole string has beyond the prompt's, as in lm-evaluation-harness.

    Args:
        max_text_tokens: most tokens of an item's text.
        window: most tokens of prompt and answer together: the model's positions, less `end`.
        end: token ids to append to each answer, for answers that overlap.
    Raises:
        Refused: the prompt does not fit the window even without a text, the tokenizer cannot tell prompt and label
            words apart, or its chat template cannot be used.
    """
    contexts, answers, num_truncated = SharedRows(), [], 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        cut, some_contexts, wholes = _fitted(tokenizer, prompt, some, max_text_tokens, window)
        num_truncated += sum(before != after for before, after in zip(some, cut, strict=True))
        for context, options in zip(some_contexts, wholes, strict=True):
            contexts.append(context)
            answers.append([[*answer, *end] for answer in _answers_behind(tokenizer, prompt, context, options)])
    single = all(len(answer) == 1 for options in answers for answer in options) and len({str(o) for o in answers}) == 1
    if single:
        rows, targets = contexts, [[token for (token,) in options] for options in answers]
    else:
        rows, targets = SharedRows(), [answer for options in answers for answer in options]
        for context, options in zip(contexts, answers, strict=True):
            for answer in options:
                rows.append(context + array("i", answer[:-1]))
    # the tokens whose logits score an answer must be computed in its row: they cannot be shared
    most_shared = int((rows.lengths - (1 if single else np.array([len(target) for target in targets]))).min())
    return PromptData(
        rows=rows,
        targets=targets,
        num_labels=len(prompt.label_words),
        single_token=single,
        pad_id=tokenizer.pad_token_id,
        num_shared=min(len(rows.head), most_shared),
        num_truncated=num_truncated,
    )


def _answers_behind(tokenizer, prompt: Prompt, context: list[int], wholes: list[list[int]]) -> list[list[int]]:
    """Return the tokens that each answer adds to a prompt's.

    Raises:
        Refused: an answer changes the prompt's own tokens, or adds none, or the same as another answer.
    """
    found = [whole[len(context) :] for whole in wholes]
    for place, (word, whole) in enumerate(zip(prompt.label_words, wholes, strict=True)):
        if whole[: len(context)] != context:
            problem = f"merges the label word {word!r} with the end of the prompt"
        elif not found[place]:
            problem = f"has no token for the label word {word!r}"
        elif found[place] in found[:place]:
            other = prompt.label_words[found.index(found[place])]
            problem = f"gives the label words {other!r} and {word!r} the same tokens"
        else:
            continue
        raise Refused(
            f"the tokenizer of {tokenizer.name_or_path} {problem}, so that their scores mean nothing: use the other "
            "--prompt-format, or another model"
        )
    return found


def _fitted(tokenizer, prompt: Prompt, texts: list[str], max_text_tokens: int, window: int):
    """Return texts cut so that their prompts fit, the prompts' token ids, and those with each answer, [texts][labels].

    Cutting is repeated, because the pieces that are kept may take more tokens than before."""
    rooms = np.full(len(texts), max_text_tokens)
    cut = cut_texts(tokenizer, texts, rooms)
    contexts, wholes = _tokenise(tokenizer, prompt, cut)
    while too_long := [index for index, options in enumerate(wholes) if max(map(len, options)) > window]:
        for index, ids in zip(too_long, token_ids(tokenizer, [cut[index] for index in too_long], False), strict=True):
            if not ids:
                shots, labels = len(prompt.shots), len(prompt.label_words)
                kind, way_out = (
                    (f"with {shots} shots", "use fewer --shots")
                    if shots
                    else (f"for {labels} labels", "use fewer or shorter labels, or a model with a longer window")
                )
                raise Refused(
                    f"the prompt {kind} takes {max(map(len, wholes[index]))} tokens without any text and the model's "
                    f"window is {window}: {way_out}"
                )
            rooms[index] = max(0, min(rooms[index], len(ids)) - (max(map(len, wholes[index])) - window))
        shorter = cut_texts(tokenizer, [texts[index] for index in too_long], rooms[too_long])
        again = _tokenise(tokenizer, prompt, shorter)
        for index, text, context, options in zip(too_long, shorter, *again, strict=True):
            cut[index], contexts[index], wholes[index] = text, context, options
    return cut, contexts, wholes


def _tokenise(tokenizer, prompt: Prompt, texts: list[str]) -> tuple[list[list[int]], list[list[list[int]]]]:
    rendered = prompt.render_all(tokenizer, texts)
    # a chat template writes its own BOS; a plain prompt gets the tokenizer's
    contexts = token_ids(tokenizer, rendered, not prompt.chat)
    answers = prompt.answers(tokenizer)
    joined = [context + answer for context in rendered for answer in answers]
    flat = token_ids(tokenizer, joined, not prompt.chat)
    size = len(prompt.label_words)
    return contexts, [flat[start : start + size] for start in range(0, len(flat), size)]


def draw_shots(examples: list, num_shots: int, labels: Sequence[str], seed: int) -> tuple:
    """Draw examples for a prompt by seed, as evenly over the labels as possible, in random order.

    Args:
        examples: each a zerotune.tasks.splits.Example with a label.
    Raises:
        Refused: a label has too few examples.
    """
    chosen, num_labels = [], len(labels)
    for place, label in enumerate(random_order(num_labels, seed, "labels of shots")):
        of_label = [example for example in examples if example.label == label]
        wanted = num_shots // num_labels + (place < num_shots % num_labels)
        if len(of_label) < wanted:
            found = f"{wanted} examples of label {labels[label]!r} and there are {len(of_label)}"
            raise Refused(f"--shots {num_shots} needs {found}")
        chosen += [of_label[index] for index in random_order(len(of_label), seed, f"shots of {label}")[:wanted]]
    return tuple(chosen[index] for index in random_order(len(chosen), seed, "order of shots"))


def calibrate(log_likelihoods: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Return log-probabilities after contextual calibration, [items, labels].

    Zhao et al. 2021, equation 2 with W = diag(p_cf)^-1, b = 0.

    Args:
        log_likelihoods: [items, labels].
        content_free: log-likelihoods of the content-free prompts, [inputs, labels].
    """
    # never as probabilities: a long label's would be 0
    mean = np.logaddexp.reduce(log_softmax(content_free), axis=0) - np.log(len(content_free))
    return log_softmax(log_softmax(log_likelihoods) - mean)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return natural log-probabilities over the labels, [items, labels]."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
