"""IMDB: is a film review positive or negative? Its rows, its splits and the wordings of its prompt.

A made-up row in the data set's form (markup and all):

    text,label
    "A small, stubborn film.<br /><br />It earns its quiet ending, &amp; then some.",1

Label 1 is positive, 0 negative. There are 25,000 train and 25,000 test reviews, sorted by label; 123 texts are in both.
Much published work pools them and splits 70/10/20. Maas et al. 2011.
"""

import html
import re
from functools import partial

from zerotune.settings.names import DATASETS
from zerotune.tasks.sample import sample_reviews
from zerotune.tasks.splits import draw_validation
from zerotune.tasks.texts import TextTask, Wording

VALIDATION_SHARE = 0.1
_LINE_BREAKS = re.compile(r"\s*(?:<\s*br\s*/?\s*>\s*)+", re.IGNORECASE)
_MARKUP = re.compile(r"</?(?:i|b|em|p|u|strong|hr|a|blockquote|spoiler)\b[^<>]*>", re.IGNORECASE)


def strip_markup(text: str) -> str:
    """Replace each run of `<br />` by one line break, remove other tags, and decode entities."""
    return html.unescape(_MARKUP.sub("", _LINE_BREAKS.sub("\n", text)))


IMDB = TextTask(
    name="imdb",
    title="IMDB",
    splits=("official", "80-20", "70-10-20"),
    lone_file_split="70-10-20",
    dataset=DATASETS["imdb"],
    test_split="test",
    sample=sample_reviews,
    sample_train=(4000, 1),
    sample_test=(600, 2),
    labels=("negative", "positive"),
    text_columns=("text", "review", "sentence"),
    label_columns=("label", "sentiment"),
    clean=strip_markup,
    draw_validation=partial(draw_validation, share=VALIDATION_SHARE),
    max_length=512,
    wordings=(
        Wording("Review: {text}\nSentiment:", ("negative", "positive")),
        Wording("{text}\n\nIs this review of a film negative or positive?\nAnswer:", ("negative", "positive")),
        Wording("Film review: {text}\nDid the reviewer like the film?\nAnswer:", ("no", "yes")),
        Wording("Text: {text}\nThe opinion of the film in this text is", ("negative", "positive")),
        Wording("Here is what someone wrote of a film.\n{text}\nTheir verdict on it:", ("bad", "good")),
    ),
)
