"""SST-2: is a sentence from a film review positive or negative? Its rows, its splits and the words of its prompt.

A row of ours, in the data set's form (lower case, tokens apart, `sentence<TAB>label`):

    a small , stubborn film that earns its quiet ending .	1

Label 1 is positive, 0 negative. The published score is accuracy on the 872 validation sentences; the hub's test rows
have no labels (-1). Nine in ten train rows are phrases of other train rows, so the choosing slice is drawn from whole
sentences and takes its phrases out of train (zerotune/tasks/phrases.py). Socher et al. 2013; Wang et al. 2018 (GLUE).
"""

from zerotune.tasks.sample import sample_rows
from zerotune.tasks.split_settings import Columns
from zerotune.tasks.splits import Example, draw_choosing_slice
from zerotune.tasks.task_splits import TaskRows

TASK = "sst2"
LABELS = ("negative", "positive")
MAX_LENGTH = 256
# The first is what is meant where nothing is said; the others show what wording does to a score.
WORDINGS = (
    ("Review: {text}\nSentiment:", ("negative", "positive")),
    ("{text}\nIs this negative or positive?\nAnswer:", ("negative", "positive")),
    ("Sentence from a film review: {text}\nDid the reviewer like the film?\nAnswer:", ("no", "yes")),
    ("Text: {text}\nThe opinion of the film in this text is", ("negative", "positive")),
    ("Someone wrote of a film: {text}\nTheir verdict on it:", ("bad", "good")),
)


def _draw_choosing(
    train: list[Example], seed: int, balanced_size: int | None
) -> tuple[list[Example], list[Example], str]:
    rest, choose, num_whole = draw_choosing_slice(train, seed, balanced_size)
    return rest, choose, f"{len(choose)} rows choose, drawn from the {num_whole} whole sentences of train"


ROWS = TaskRows(
    task=TASK,
    title="SST-2",
    columns=Columns(text=("sentence", "text"), label=("label",), labels=LABELS),
    rules=("official", "80-20"),
    lone_file_rule="80-20",
    dataset="stanfordnlp/sst2",
    reporting="validation",
    sample=sample_rows,
    sample_train=(8000, 1),
    sample_test=(1000, 2),
    draw_choosing=_draw_choosing,
    drawn_notes={"80-20": "phrases overlap: not comparable with official figures"},
)
