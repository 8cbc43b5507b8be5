"""Evaluate a model on SST-2: a tuned final/ by its head, a causal model by the likelihood of its label words.

    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final
    python eval/sst2.py --model meta-llama/Llama-3.2-1B --shots 4 --calibrate contextual
    accelerate launch --num_processes 8 eval/sst2.py --model mistralai/Mistral-7B-v0.3 --load-4bit
    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final --dataset stanfordnlp/sst2:test

The last line predicts the unlabelled test rows and writes submission.tsv, the form of GLUE's test server.
"""

from zerotune.run.process import run_script
from zerotune.settings.flags import eval_parser
from zerotune.tasks import sst2


def main(args):
    from zerotune import text_classification

    text_classification.evaluate(args, sst2)


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__, sst2).parse_args())
