"""train/imdb.py --engine trainer, but its steps are made of the loop's examples: the two must then agree."""

from zerotune import text_classification
from zerotune.run.process import run_script
from zerotune.settings.flags import train_parser, with_engine_flag
from zerotune.tasks import imdb
from zerotune.training import trainer as trainer_engine
from zerotune.training.loop import Loop

if __name__ == "__main__":
    trainer_engine.TrainerLoop._epoch_steps = Loop._epoch_steps
    parser = with_engine_flag(train_parser(__doc__, imdb))
    run_script(lambda args: text_classification.train(args, imdb, args.engine), parser.parse_args())
