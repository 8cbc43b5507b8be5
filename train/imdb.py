"""Fine-tune a model to tell negative from positive film reviews (IMDB), and report it against itself before training.

    accelerate launch train/imdb.py --sample
    accelerate launch train/imdb.py --split 70-10-20 --output-dir runs/imdb-loop
    accelerate launch train/imdb.py --split 70-10-20 --output-dir runs/imdb-trainer --engine trainer
    accelerate launch --num_processes 8 train/imdb.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    accelerate launch train/imdb.py --model mistralai/Mistral-7B-Instruct-v0.3 --method qlora --head generate

The same command starts a run, goes on with it, or says that it is finished.
"""

from zerotune.run.process import run_script
from zerotune.settings.flags import train_parser, with_engine_flag
from zerotune.tasks import imdb


def main(args):
    from zerotune import text_classification

    text_classification.train(args, imdb, args.engine)


if __name__ == "__main__":
    run_script(main, with_engine_flag(train_parser(__doc__, imdb)).parse_args())
