"""IMDB: is a film review positive or negative? Its rows, its splits and the words of its prompt.

A row of ours, in the data set's form (markup and all):

    text,label
    "A small, stubborn film.<br /><br />It earns its quiet ending, &amp; then some.",1

Label 1 is positive, 0 negative. 25,000 reviews train and 25,000 report, sorted by label, 123 texts on both sides; much
published work pools them and splits 70/10/20. Maas et al. 2011.
"""

import html
import re

from zerotune.tasks.sample import sample_reviews
from zerotune.tasks.split_settings import Columns
from zerotune.tasks.splits import Example, balanced_subset, stratified_subset, without_texts_of
from zerotune.tasks.task_splits import TaskRows

TASK = "imdb"
LABELS = ("negative", "positive")
MAX_LENGTH = 512
# The first is what is meant where nothing is said; the others show what wording does to a score.
WORDINGS = (
    ("Review: {text}\nSentiment:", ("negative", "positive")),
    ("{text}\n\nIs this review of a film negative or positive?\nAnswer:", ("negative", "positive")),
    ("Film review: {text}\nDid the reviewer like the film?\nAnswer:", ("no", "yes")),
    ("Text: {text}\nThe opinion of the film in this text is", ("negative", "positive")),
    ("Here is what someone wrote of a film.\n{text}\nTheir verdict on it:", ("bad", "good")),
)

CHOOSE_SHARE = 0.1
_LINE_BREAKS = re.compile(r"\s*(?:<\s*br\s*/?\s*>\s*)+", re.IGNORECASE)
_MARKUP = re.compile(r"</?(?:i|b|em|p|u|strong|hr|a|blockquote|spoiler)\b[^<>]*>", re.IGNORECASE)


def mend(text: str) -> str:
    """A review without its markup: runs of `<br />` are one line break, other tags go, entities are characters."""
    return html.unescape(_MARKUP.sub("", _LINE_BREAKS.sub("\n", text)))


def _draw_choosing(
    train: list[Example], seed: int, balanced_size: int | None
) -> tuple[list[Example], list[Example], str]:
    if balanced_size is None:
        choose = stratified_subset(train, round(CHOOSE_SHARE * len(train)), seed, "choose")
    else:
        choose = balanced_subset(train, balanced_size, seed, "--validation-size")
    return without_texts_of(train, choose), choose, f"{len(choose)} rows of train choose"


ROWS = TaskRows(
    task=TASK,
    title="IMDB",
    columns=Columns(text=("text", "review"), label=("label", "sentiment"), labels=LABELS, mend=mend),
    rules=("official", "80-20", "70-10-20"),
    lone_file_rule="70-10-20",
    dataset="stanfordnlp/imdb",
    reporting="test",
    sample=sample_reviews,
    sample_train=(4000, 1),
    sample_test=(600, 2),
    draw_choosing=_draw_choosing,
)
