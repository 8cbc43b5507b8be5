"""Fine-tune a model to tell positive from negative sentences (SST-2), and report it against itself before training.

    accelerate launch train/sst2.py --sample
    accelerate launch train/sst2.py --model distilbert/distilbert-base-uncased
    accelerate launch --num_processes 8 train/sst2.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    accelerate launch train/sst2.py --model mistralai/Mistral-7B-v0.3 --method qlora --activation-checkpointing
    accelerate launch train/sst2.py --model google/gemma-2-2b-it --method lora --head generate

The same command starts a run, goes on with it, or says that it is finished.
"""

from zerotune.run.process import run_script
from zerotune.settings.flags import train_parser
from zerotune.tasks import sst2


def main(args):
    from zerotune import text_classification

    text_classification.train(args, sst2)


if __name__ == "__main__":
    run_script(main, train_parser(__doc__, sst2).parse_args())
