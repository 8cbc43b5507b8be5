"""Evaluate a model on IMDB: a tuned final/ by its head, a causal model by the likelihood of its label words.

    python eval/imdb.py --model runs/imdb-distilbert-base-uncased-full/final
    python eval/imdb.py --model google/gemma-2-2b-it --shots 4 --prompt-seeds 5 --test-size 2500
    accelerate launch --num_processes 8 eval/imdb.py --model google/gemma-2-2b-it --shots 4 --calibrate contextual
    python eval/imdb.py --sample --shots 4 --prompt-seeds 3

The last line needs neither a network nor a model.
"""

from zerotune.run.process import run_script
from zerotune.settings.flags import eval_parser
from zerotune.tasks import imdb


def main(args):
    from zerotune import text_classification

    text_classification.evaluate(args, imdb)


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__, imdb).parse_args())
