"""Read WordNet 3.0 for METEOR without a download: Debian's files (package wordnet-base), or else NLTK's own.

Fellbaum 1998, WordNet: An Electronic Lexical Database.
"""

import io
import warnings
from pathlib import Path

DEBIAN_FOLDER = Path("/usr/share/wordnet")
# NLTK wants a file with the names of the 45 lexicographer files. Debian's package has none, and METEOR uses no name.
_LEXNAMES = "".join(f"{number:02d}\tfile.{number}\t1\n" for number in range(45))


def read_wordnet(folder: Path = DEBIAN_FOLDER):
    """Return NLTK's reader of the files in `folder`, else of those that NLTK has; None if neither is there."""
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file):
            return io.StringIO(_LEXNAMES) if file == "lexnames" else super().open(file)

        def map_wn(self, version="wordnet"):
            return None  # joins WordNets of other languages, which METEOR does not use

    names = [f"{kind}.{part}" for kind in ("data", "index") for part in ("noun", "verb", "adj", "adv")]
    if all((folder / name).is_file() for name in names):
        if str(folder) not in nltk.data.path:
            nltk.data.path.append(str(folder))  # NLTK opens no file outside the folders named here
        root = nltk.data.FileSystemPathPointer(str(folder))
    else:
        root = _nltk_folder()
        if root is None:
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing files of other languages
        return Reader(root, None)


def _nltk_folder():
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            return nltk.data.find(name)
        except LookupError:
            continue
    return None
