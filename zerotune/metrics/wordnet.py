"""WordNet 3.0 for METEOR, without a download: Debian's files (package wordnet-base), or NLTK's where they are there.

Fellbaum 1998, WordNet: An Electronic Lexical Database.
"""

import io
import warnings
from pathlib import Path

DEBIAN_FOLDER = Path("/usr/share/wordnet")
# The lexicographer files in the order of their numbers, as the manual page lexnames(5WN) lists them. NLTK reads them
# from a file that Debian's package lacks.
_LEXICOGRAPHER_FILES = {
    "adj": ("all", "pert"),
    "adv": ("all",),
    "noun": (
        "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
        "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
        "quantity", "relation", "shape", "state", "substance", "time",
    ),
    "verb": (
        "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
        "motion", "perception", "possession", "social", "stative", "weather",
    ),
}  # fmt: skip
_PART_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def lexnames() -> str:
    """WordNet's lexnames file: number, name and part of speech of each lexicographer file, a line each."""
    names = [(part, name) for part, names in _LEXICOGRAPHER_FILES.items() for name in names] + [("adj", "ppl")]
    lines = (f"{number:02d}\t{part}.{name}\t{_PART_OF_SPEECH[part]}\n" for number, (part, name) in enumerate(names))
    return "".join(lines)


def read_wordnet(folder: Path = DEBIAN_FOLDER):
    """NLTK's reader of WordNet's files in `folder`, else of those that NLTK itself has; None where neither is there."""
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file):
            if file == "lexnames":
                return io.StringIO(lexnames())
            return super().open(file)

        def map_wn(self, version="wordnet"):
            return None  # it joins WordNets of other languages, which METEOR does not ask

    if all((folder / f"{kind}.{part}").is_file() for kind in ("data", "index") for part in _PART_OF_SPEECH):
        if str(folder) not in nltk.data.path:
            nltk.data.path.append(str(folder))  # NLTK opens no file outside the folders named here
        root = nltk.data.FileSystemPathPointer(str(folder))
    else:
        root = _nltk_folder()
        if root is None:
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other languages' missing files
        return Reader(root, None)


def _nltk_folder():
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            return nltk.data.find(name)
        except LookupError:
            continue
    return None
