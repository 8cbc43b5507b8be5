"""Run train/imdb.py --engine trainer with the same examples in each step as the loop, so the two must agree."""

import runpy

from zerotune.training.batches import LengthBatches
from zerotune.training.trainer import TrainerOrder

if __name__ == "__main__":
    TrainerOrder.epoch_steps = LengthBatches.epoch_steps
    runpy.run_path("train/imdb.py", run_name="__main__")
