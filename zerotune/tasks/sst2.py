"""SST-2: is a sentence from a film review positive or negative? Its rows, its splits and the wordings of its prompt.

A made-up row in the data set's form (lower case, spaces between tokens, `sentence<TAB>label`):

    a small , stubborn film that earns its quiet ending .	1

Label 1 is positive, 0 negative. The published score is accuracy on the 872 validation sentences; the hub's test rows
have no labels (-1). Nine in ten train rows are phrases of other train rows, so validation rows are drawn from whole
sentences, and their phrases leave train. Socher et al. 2013; Wang et al. 2018 (GLUE).
"""

from zerotune.settings.names import DATASETS
from zerotune.tasks.sample import sample_rows
from zerotune.tasks.splits import draw_validation_sentences
from zerotune.tasks.texts import TextTask, Wording

SST2 = TextTask(
    name="sst2",
    title="SST-2",
    splits=("official", "80-20"),
    lone_file_split="80-20",
    split_warnings={"80-20": "phrases overlap: not comparable with official figures"},
    dataset=DATASETS["sst2"],
    test_split="validation",
    sample=sample_rows,
    sample_train=(8000, 1),
    sample_test=(1000, 2),
    labels=("negative", "positive"),
    text_columns=("sentence", "text", "review"),
    label_columns=("label", "sentiment"),
    draw_validation=draw_validation_sentences,
    max_length=256,
    wordings=(
        Wording("Review: {text}\nSentiment:", ("negative", "positive")),
        Wording("{text}\nIs this negative or positive?\nAnswer:", ("negative", "positive")),
        Wording("Sentence from a film review: {text}\nDid the reviewer like the film?\nAnswer:", ("no", "yes")),
        Wording("Text: {text}\nThe opinion of the film in this text is", ("negative", "positive")),
        Wording("Someone wrote of a film: {text}\nTheir verdict on it:", ("bad", "good")),
    ),
)
