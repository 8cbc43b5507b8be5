"""Classification by a causal model without a head: the likelihood of the label words after a prompt."""

import re
from dataclasses import dataclass

import numpy as np
import torch

from zerotune.data import to_device
from zerotune.errors import Refused
from zerotune.language_model import answer_logits
from zerotune.randomness import random_order
from zerotune.runs import short_name
from zerotune.shared_prefix import num_shared_tokens, prefix_cache

# Llama-3's template prints today's date unless it is given one; scores must not depend on the day.
PINNED_DATE = "26 Jul 2024"
CHAT_NAMES = re.compile(r"(^|[-_./])(it|chat|instruct)($|[-_./])", re.IGNORECASE)
# Zhao et al. 2021 (arXiv:2102.09690), section 5: three content-free inputs.
CONTENT_FREE_TEXTS = ("N/A", "[MASK]", "")
# A token of a shared prefix costs a row no computation, but its keys and values: so much of a token of its own.
PREFIX_TOKENS_PER_TOKEN = 8


@dataclass(frozen=True)
class Prompt:
    """Wording of a task: `template` with `{text}`, and a word for each label in label order."""

    template: str
    label_words: tuple[str, ...]
    chat: bool = False
    shots: tuple[tuple[str, int], ...] = ()

    def render(self, tokenizer, text: str) -> str:
        """Everything that stands before the answer."""
        if not self.chat:
            solved = [f"{self.template.format(text=shot)} {self.label_words[label]}\n\n" for shot, label in self.shots]
            return "".join(solved) + self.template.format(text=text)
        turns = []
        for shot, label in self.shots:
            turns.append({"role": "user", "content": self.template.format(text=shot)})
            turns.append({"role": "assistant", "content": self.label_words[label]})
        turns.append({"role": "user", "content": self.template.format(text=text)})
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, date_string=PINNED_DATE)

    def answers(self) -> list[str]:
        """The label words as they follow the prompt: after a space in plain text, at once in a chat turn."""
        return list(self.label_words) if self.chat else [f" {word}" for word in self.label_words]


def uses_chat(wanted: str, tokenizer, name: str) -> bool:
    """`--prompt-format`: "auto" means the chat template for models whose name says it, chat or instruct.

    Raises:
        Refused: chat was asked for and the tokenizer has no template.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if wanted == "chat" and not has_template:
        raise Refused(f"--prompt-format chat: the tokenizer of {name} has no chat template: use --prompt-format plain")
    return has_template and (wanted == "chat" or (wanted == "auto" and bool(CHAT_NAMES.search(short_name(name)))))


@dataclass(frozen=True)
class PromptData:
    """Prompts with their possible answers, tokenised.

    One row an item when every answer is a single token (`num_answer_tokens` 1), else one row an item and label.

    Attributes:
        rows: token ids of each row, without the answer's last token; [num_items × rows_per_item] lists.
        targets: answer token ids of each row: [labels] in the single-token form, else the row's own answer.
        num_shared: tokens that all rows begin with: shots, and the question up to the text.
        num_truncated: items whose text was cut to fit.
    """

    rows: list[list[int]]
    targets: list[list[int]]
    num_labels: int
    single_token: bool
    pad_id: int
    num_shared: int
    num_truncated: int

    @property
    def rows_per_item(self) -> int:
        """1, or the number of labels."""
        return 1 if self.single_token else self.num_labels

    @property
    def lengths(self) -> np.ndarray:
        """What an item costs in tokens, [num_items]: its longest row without the shared tokens, and a part of those, by
        its number of rows."""
        counts = np.array([len(row) for row in self.rows]).reshape(-1, self.rows_per_item)
        own = counts.max(axis=1) - self.num_shared + self.num_shared // PREFIX_TOKENS_PER_TOKEN
        return own * self.rows_per_item

    def prefix(self, model, device: torch.device):
        """The keys and values of the shared tokens, for `log_likelihoods`; None where nothing is shared."""
        return prefix_cache(model, self.rows[0][: self.num_shared], device)

    def log_likelihoods(self, model, items: np.ndarray, device: torch.device, prefix=None) -> np.ndarray:
        """Log-probability of each answer up to a constant of the item, float32 [items, num_labels].

        Rows are padded on the right, where a causal model looks from no token of theirs: they need no mask, and
        positions count from the prefix. Logits are computed where answers are.

        Args:
            prefix: what `prefix` returned; None computes every row from its first token.
        """
        numbers = [item * self.rows_per_item + offset for item in items for offset in range(self.rows_per_item)]
        skipped = 0 if prefix is None else self.num_shared
        rows, targets = [self.rows[n][skipped:] for n in numbers], [self.targets[n] for n in numbers]
        num_kept = 1 if self.single_token else max(len(target) for target in targets)
        lengths = np.array([len(row) for row in rows])
        input_ids = np.full((len(rows), lengths.max()), self.pad_id, dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
        hidden = model.base_model(
            input_ids=to_device(input_ids, device),
            position_ids=to_device(np.arange(skipped, skipped + lengths.max())[None], device),
            past_key_values=prefix,
            use_cache=prefix is not None,
        ).last_hidden_state
        kept = (lengths[:, None] - np.arange(num_kept, 0, -1)).clip(min=0)
        hidden = hidden[torch.arange(len(rows), device=device)[:, None], to_device(kept, device)]
        if self.single_token:
            # of one next token only the label words are compared: what they share, normalising takes away
            return answer_logits(model, hidden[:, -1], self.targets[0]).cpu().numpy()
        log_probabilities, sums = answer_logits(model, hidden).log_softmax(-1), []
        for row, target in zip(log_probabilities, targets, strict=True):
            picked = torch.tensor(target, device=row.device)[:, None]
            sums.append(row[-len(target) :].gather(1, picked).sum())
        return torch.stack(sums).reshape(len(items), self.num_labels).cpu().numpy()


def encode_prompts(tokenizer, prompt: Prompt, texts: list[str], max_text_tokens: int, window: int) -> PromptData:
    """Tokenise prompts and answers, cutting the end of a text (never the shots or the question) so that all fits.

    An answer's tokens are those that the whole string has beyond the prompt's own, as in lm-evaluation-harness.

    Args:
        max_text_tokens: most tokens of one item's text.
        window: most tokens of prompt and answer together (the model's position embeddings).
    Raises:
        Refused: prompt and shots alone are longer than the window.
    """
    cut = [_cut_text(tokenizer, text, max_text_tokens) for text in texts]
    contexts, wholes = _tokenise(tokenizer, prompt, cut)
    for index, options in enumerate(wholes):
        while (excess := max(map(len, options)) - window) > 0:
            num_tokens = len(tokenizer(cut[index], add_special_tokens=False)["input_ids"])
            if num_tokens == 0:
                raise Refused(
                    f"the prompt with {len(prompt.shots)} shots takes {max(map(len, options))} tokens without any text "
                    f"and the model's window is {window}: use fewer --shots"
                )
            cut[index] = _cut_text(tokenizer, cut[index], max(0, num_tokens - excess))
            (contexts[index],), (options,) = _tokenise(tokenizer, prompt, [cut[index]])
            wholes[index] = options
    answers = [[whole[len(context) :] for whole in options] for context, options in zip(contexts, wholes, strict=True)]
    single = all(len(answer) == 1 for options in answers for answer in options) and len({str(o) for o in answers}) == 1
    rows = contexts if single else [whole[:-1] for options in wholes for whole in options]
    if single:
        targets = [[token for (token,) in options] for options in answers]
    else:
        targets = [answer for options in answers for answer in options]
    num_read = [1 if single else len(target) for target in targets]
    # the tokens after which an answer's tokens are read are each row's own
    most_shared = min(len(row) - count for row, count in zip(rows, num_read, strict=True))
    return PromptData(
        rows=rows,
        targets=targets,
        num_labels=len(prompt.label_words),
        single_token=single,
        pad_id=tokenizer.pad_token_id,
        num_shared=num_shared_tokens(rows, most_shared),
        num_truncated=sum(before != after for before, after in zip(texts, cut, strict=True)),
    )


def _tokenise(tokenizer, prompt: Prompt, texts: list[str]) -> tuple[list[list[int]], list[list[list[int]]]]:
    rendered = [prompt.render(tokenizer, text) for text in texts]
    # a chat template writes its own BOS; a plain prompt gets the tokenizer's
    contexts = tokenizer(rendered, add_special_tokens=not prompt.chat)["input_ids"]
    joined = [context + answer for context in rendered for answer in prompt.answers()]
    flat = tokenizer(joined, add_special_tokens=not prompt.chat)["input_ids"]
    size = len(prompt.label_words)
    return contexts, [flat[start : start + size] for start in range(0, len(flat), size)]


def _cut_text(tokenizer, text: str, max_tokens: int) -> str:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    if len(offsets) <= max_tokens:
        return text
    return text[: offsets[max_tokens - 1][1]] if max_tokens else ""


def draw_shots(examples: list, num_shots: int, num_labels: int, seed: int) -> tuple[tuple[str, int], ...]:
    """Labelled examples for a prompt: as equal in number per label as can be, in random order, by seed.

    Args:
        examples: of zerotune.splits.Example, all labelled.
    Raises:
        Refused: a label has too few examples.
    """
    chosen = []
    for place, label in enumerate(random_order(num_labels, seed, "labels of shots")):
        of_label = [example for example in examples if example.label == label]
        wanted = num_shots // num_labels + (place < num_shots % num_labels)
        if len(of_label) < wanted:
            raise Refused(f"--shots {num_shots} needs {wanted} examples of label {label} and there are {len(of_label)}")
        chosen += [of_label[index] for index in random_order(len(of_label), seed, f"shots of {label}")[:wanted]]
    return tuple(
        (chosen[index].text, chosen[index].label) for index in random_order(len(chosen), seed, "order of shots")
    )


def calibrate(log_likelihoods: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Contextual calibration (Zhao et al. 2021, equation 2 with W = diag(p_cf)^-1, b = 0).

    Args:
        log_likelihoods: [items, labels].
        content_free: log-likelihoods of the content-free prompts, [inputs, labels].
    Returns:
        Natural log-probabilities, [items, labels].
    """
    probabilities = np.exp(normalise(content_free)).mean(axis=0)
    return normalise(normalise(log_likelihoods) - np.log(probabilities))


def normalise(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities over the labels alone: log softmax of [items, labels]."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
