"""train/imdb.py --engine trainer, but its steps are made of the loop's examples: the two must then agree."""

import runpy

from zerotune.training.batches import LengthBatches
from zerotune.training.trainer import TrainerOrder

if __name__ == "__main__":
    TrainerOrder.epoch_steps = LengthBatches.epoch_steps
    runpy.run_path("train/imdb.py", run_name="__main__")
