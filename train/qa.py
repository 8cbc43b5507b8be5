"""Fine-tune a model to answer SQuAD v2's questions, or to say that a paragraph does not, and report it officially.

    accelerate launch train/qa.py --sample
    accelerate launch train/qa.py --model distilbert/distilbert-base-uncased
    accelerate launch --num_processes 8 train/qa.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    accelerate launch train/qa.py --model meta-llama/Llama-3.2-1B-Instruct --method lora --head generate
    accelerate launch train/qa.py --train-file train-v2.0.json --test-file dev-v2.0.json --eval-every 500

The same command starts a run, goes on with it, or says that it is finished.
"""

from zerotune.run.process import run_script
from zerotune.squad.settings import qa_train_parser


def main(args):
    from zerotune import question_answering

    question_answering.train(args)


if __name__ == "__main__":
    run_script(main, qa_train_parser(__doc__).parse_args())
