"""Phrases inside sentences: which texts stand, word for word, inside which others."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class PhraseIndex:
    """Which of a set of normalised texts stand inside another text, word for word.

    A text that starts at some word of a sentence is a prefix of the sentence's rest from there. In a sorted list every
    prefix of a string s is the greatest entry not above s, or a prefix of that entry: one bisection per word, then a
    walk along prefixes. The closing space of every key keeps matches to whole words."""

    def __init__(self, texts: Iterable[str]):
        self.keys = sorted({text + " " for text in texts})
        self.prefix_of: list[int | None] = []
        open_prefixes: list[int] = []
        for number, key in enumerate(self.keys):
            while open_prefixes and not key.startswith(self.keys[open_prefixes[-1]]):
                open_prefixes.pop()
            self.prefix_of.append(open_prefixes[-1] if open_prefixes else None)
            open_prefixes.append(number)

    def inside(self, text: str) -> Iterator[str]:
        """Every indexed text that stands in `text` by whole words, `text` itself too; some of them several times."""
        rest = text + " "
        while rest:
            entry = bisect_right(self.keys, rest) - 1
            while entry is not None and entry >= 0:
                if rest.startswith(self.keys[entry]):
                    yield self.keys[entry][:-1]
                entry = self.prefix_of[entry]
            rest = rest[rest.index(" ") + 1 :]

    def outermost(self) -> set[str]:
        """The indexed texts that stand inside no other one."""
        inner: set[str] = set()
        # longest first: whatever stands inside an inner text was found when its own outer text was searched
        for key in sorted(self.keys, key=len, reverse=True):
            text = key[:-1]
            if text not in inner:
                inner.update(found for found in self.inside(text) if found != text)
        return {key[:-1] for key in self.keys} - inner
