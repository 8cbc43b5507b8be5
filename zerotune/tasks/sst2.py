"""SST-2: is a sentence from a film review positive or negative? Its rows, its splits and the wordings of its prompt.

A made-up row in the data set's form (lower case, tokens apart, `sentence<TAB>label`):

    a small , stubborn film that earns its quiet ending .	1

Label 1 is positive, 0 negative. The published score is accuracy on the 872 validation sentences; the hub's test rows
have no labels (-1). Nine in ten train rows are phrases of other train rows, so the rows that validate are drawn from
whole sentences, and their phrases leave train. Socher et al. 2013; Wang et al. 2018 (GLUE).
"""

from functools import partial

from zerotune.tasks import texts
from zerotune.tasks.sample import sample_rows
from zerotune.tasks.splits import draw_validation_sentences

TASK, TITLE = "sst2", "SST-2"
DATASET = "stanfordnlp/sst2"
SPLITS = ("official", "80-20")
LABELS = ("negative", "positive")
MAX_LENGTH = 256
# The first is the default; the others show how much a score depends on the wording.
WORDINGS = (
    ("Review: {text}\nSentiment:", ("negative", "positive")),
    ("{text}\nIs this negative or positive?\nAnswer:", ("negative", "positive")),
    ("Sentence from a film review: {text}\nDid the reviewer like the film?\nAnswer:", ("no", "yes")),
    ("Text: {text}\nThe opinion of the film in this text is", ("negative", "positive")),
    ("Someone wrote of a film: {text}\nTheir verdict on it:", ("bad", "good")),
)

CORPUS = texts.TextCorpus(
    task=TASK,
    title=TITLE,
    splits=SPLITS,
    lone_file_split="80-20",
    split_warnings={"80-20": "phrases overlap: not comparable with official figures"},
    dataset=DATASET,
    test_split="validation",
    sample=sample_rows,
    sample_train=(8000, 1),
    sample_test=(1000, 2),
    labels=LABELS,
    text_columns=("sentence", "text"),
    label_columns=("label",),
    draw_validation=draw_validation_sentences,
)

load = partial(texts.load, CORPUS)
load_test = partial(texts.load_test, CORPUS)
load_shots = partial(texts.load_shots, CORPUS)
