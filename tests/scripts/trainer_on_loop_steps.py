"""train/imdb.py --engine trainer, but its steps are made of the loop's examples: the two must then agree."""

from zerotune import imdb, text_classification
from zerotune.command_line.arguments import train_parser, with_engine_flag
from zerotune.run.process import run_script
from zerotune.training import trainer_engine
from zerotune.training.loop import Loop

if __name__ == "__main__":
    trainer_engine.TrainerLoop._epoch_steps = Loop._epoch_steps
    parser = with_engine_flag(train_parser(__doc__, imdb))
    run_script(lambda args: text_classification.train(args, imdb, args.engine), parser.parse_args())
