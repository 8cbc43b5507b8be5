"""Tuning a generator on sample questions, without files: for tests of its loop, as a launched process.

python tests/scripts/train_questions.py --model FOLDER --output-dir runs/questions
"""

import argparse
from pathlib import Path

from zerotune import launch
from zerotune.engine import Engine, build_optimizer
from zerotune.generator import load_generator
from zerotune.loop import Loop
from zerotune.models import ModelSettings, parameter_groups
from zerotune.precision import resolve_precision
from zerotune.pretrained import load_tokenizer
from zerotune.question_answers import encode_questions
from zerotune.question_evaluation import choosing_evaluation
from zerotune.question_prompts import QuestionPrompt
from zerotune.runs import RunFolder, run_script
from zerotune.schedule import plan_schedule
from zerotune.squad_files import parse_questions
from zerotune.squad_sample import sample_articles
from zerotune.stopping import StopSignal

WINDOW = 2048
FIXED = {
    "batch_size": 16,
    "patience": None,
    "keep_checkpoints": 1,
    "max_grad_norm": 1.0,
    "choose_by": "loss",
    "max_new_tokens": 6,
    "max_steps": None,
    "warmup_ratio": 0.1,
    "eval_every": None,
    "checkpoint_every": 100,
    "log_every": 1,
    "seed": 0,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--method", default="full")
    parser.add_argument("--deepspeed", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--tokens-per-device", type=int, default=2048)
    return argparse.Namespace(**FIXED, **vars(parser.parse_args()))


def main(args) -> None:
    deepspeed = launch.read_deepspeed_config(args.deepspeed)
    precision = resolve_precision("fp32", deepspeed)
    tokenizer = load_tokenizer(args.model, None)
    train, choose = (parse_questions(sample_articles(*numbers), "sample") for numbers in ((118, 1), (24, 2)))
    data = encode_questions(tokenizer, QuestionPrompt(), train, WINDOW, WINDOW)
    chosen = encode_questions(tokenizer, QuestionPrompt(), choose, WINDOW, WINDOW, args.max_new_tokens)
    filled = None if deepspeed is None else launch.fill_deepspeed_config(deepspeed, args, precision)
    accelerator = launch.start_accelerator(filled)
    with RunFolder(args.output_dir, accelerator) as run:
        settings = ModelSettings(
            args.model, None, args.method, precision=precision, zero_stage=launch.zero_stage(deepspeed)
        )
        model = load_generator(settings, tokenizer)
        groups = parameter_groups(model, args.learning_rate, None, 0.01)
        engine = Engine(accelerator, model, build_optimizer("adamw", groups, "cpu"), precision, args.max_grad_norm)
        schedule = plan_schedule(args, -(-len(train) // args.batch_size))
        evaluate = choosing_evaluation(engine, chosen, choose, tokenizer, args, args.max_new_tokens)
        Loop(engine, data, schedule, run, args, evaluate, StopSignal()).train()


if __name__ == "__main__":
    run_script(main, parse_args())
