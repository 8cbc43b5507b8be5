"""Find phrases inside sentences: texts that are contained, word for word, in other texts."""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from zerotune.run.process import say_how_far

TEXTS_AT_ONCE = 2000


class PhraseIndex:
    """Finds which of a set of normalised texts are contained in another text, word for word.

    The texts form a trie: a node stands for the first words of some of them. A search walks down the trie from each
    word of another text, one depth after the other, for thousands of words at once.

    Attributes:
        texts: the distinct texts.
        words: the number of each word of the texts. The next number stands for any other word, and follows each text.
        steps: for each depth, int64 [nodes]: parent's number * (len(words) + 1) + last word's number. They are sorted,
            and a node's index is its number.
        ends: for each depth, int32 [nodes]: which text ends at the node, -1 for none.
    """

    def __init__(self, texts: Iterable[str]):
        self.texts = list(dict.fromkeys(texts))
        self.words: dict[str, int] = {}
        for text in self.texts:
            for word in text.split(" "):
                self.words.setdefault(word, len(self.words))
        self.steps, self.ends = [], []
        words, places = self._numbered(self.texts)
        text, node = np.arange(len(self.texts), dtype=np.int32), np.zeros(len(self.texts), dtype=np.int64)
        while len(text):
            step, node = np.unique(self._codes(node, words[places]), return_inverse=True)
            is_end = words[places + 1] == len(self.words)
            end = np.full(len(step), -1, dtype=np.int32)
            end[node[is_end]] = text[is_end]
            self.steps.append(step)
            self.ends.append(end)
            text, node, places = text[~is_end], node[~is_end], places[~is_end] + 1

    def inside(self, texts: list[str]) -> set[str]:
        """Return every indexed text that is contained in one of `texts` or equal to it."""
        return {self.texts[number] for _, found in self._contained(texts) for number in found.tolist()}

    def outermost(self) -> set[str]:
        """Return the indexed texts that are contained in no other one."""
        is_inner = np.zeros(len(self.texts), dtype=bool)
        longest_first = np.argsort([-len(text) for text in self.texts], kind="stable")
        firsts = range(0, len(self.texts), TEXTS_AT_ONCE)
        for first in say_how_far(firsts, "looking for phrases of other texts", "texts", TEXTS_AT_ONCE):
            numbers = longest_first[first : first + TEXTS_AT_ONCE]
            numbers = numbers[~is_inner[numbers]]  # the longer text around an inner one contains the same phrases
            for around, found in self._contained([self.texts[number] for number in numbers.tolist()]):
                is_inner[found[found != numbers[around]]] = True
        return {text for text, inner in zip(self.texts, is_inner.tolist(), strict=True) if not inner}

    def _contained(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs of arrays, depth by depth: indices of texts in `texts`, and of indexed texts inside them."""
        words, starts = self._numbered(texts)
        around = np.repeat(np.arange(len(texts)), np.diff(starts, append=len(words)))
        places, node = np.arange(len(words)), np.zeros(len(words), dtype=np.int64)
        for step, end in zip(self.steps, self.ends, strict=True):
            codes = self._codes(node, words[places])
            node = np.minimum(np.searchsorted(step, codes), len(step) - 1)
            is_there = step[node] == codes
            around, places, node = around[is_there], places[is_there] + 1, node[is_there]
            if not len(node):
                return
            found = end[node]
            yield around[found >= 0], found[found >= 0]

    def _codes(self, node: np.ndarray, word: np.ndarray) -> np.ndarray:
        return node * (len(self.words) + 1) + word

    def _numbered(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the word numbers of all texts, one text after the other, and the index at which each text starts."""
        no_word, words, starts = len(self.words), array("i"), array("q")
        for text in texts:
            starts.append(len(words))
            words.extend([self.words.get(word, no_word) for word in text.split(" ")])
            words.append(no_word)
        return np.array(words, dtype=np.int32), np.array(starts, dtype=np.int64)
