"""Phrases inside sentences: which texts are contained, word for word, in which others."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class PhraseIndex:
    """Finds which of a set of normalised texts are contained in another text, word for word.

    A text that starts at some word of a sentence is a prefix of the sentence from there. In a sorted list every prefix
    of a string is the greatest entry not above it, or a prefix of that entry: one bisection per word, then a walk along
    prefixes. The closing space of every key keeps matches to whole words."""

    def __init__(self, texts: Iterable[str]):
        self.keys = sorted({text + " " for text in texts})
        self.prefix_of: list[int] = []  # of each key, the longest other key that is a prefix of it; -1: none
        open_prefixes = [-1]
        for number, key in enumerate(self.keys):
            while len(open_prefixes) > 1 and not key.startswith(self.keys[open_prefixes[-1]]):
                open_prefixes.pop()
            self.prefix_of.append(open_prefixes[-1])
            open_prefixes.append(number)

    def inside(self, text: str) -> Iterator[str]:
        """Yield every indexed text that is contained in `text`, `text` itself too; some of them several times."""
        for entry in self._longest_from_each_word(text + " "):
            while entry >= 0:
                yield self.keys[entry][:-1]
                entry = self.prefix_of[entry]

    def outermost(self) -> set[str]:
        """Return the indexed texts that are contained in no other one."""
        keys, prefix_of = self.keys, self.prefix_of
        is_inner = bytearray(len(keys))
        # longest first: whatever an inner text contains was found when the text around it was searched
        for number in sorted(range(len(keys)), key=lambda number: -len(keys[number])):
            if not is_inner[number]:
                for entry in self._longest_from_each_word(keys[number]):
                    entry = prefix_of[entry] if entry == number else entry
                    while entry >= 0 and not is_inner[entry]:  # the prefixes of an inner text are marked already
                        is_inner[entry] = True
                        entry = prefix_of[entry]
        return {key[:-1] for key, inner in zip(keys, is_inner, strict=True) if not inner}

    def _longest_from_each_word(self, rest: str) -> Iterator[int]:
        """Yield the longest key that starts at each word, as its number, where there is one."""
        keys, prefix_of = self.keys, self.prefix_of
        while rest:
            entry = bisect_right(keys, rest) - 1
            while entry >= 0 and not rest.startswith(keys[entry]):
                entry = prefix_of[entry]
            if entry >= 0:
                yield entry
            rest = rest[rest.index(" ") + 1 :]
