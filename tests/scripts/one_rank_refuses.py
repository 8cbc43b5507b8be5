"""A script in which the ranks in --who refuse after all ranks have met, while the others wait for everyone."""

import argparse
from pathlib import Path

from zerotune.errors import Refused
from zerotune.run import launch
from zerotune.run.process import run_script


def main(args):
    accelerator = launch.start_accelerator(None)
    if accelerator.process_index in args.who:
        raise Refused("out of memory on a single item")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", type=int, nargs="+")
    parser.add_argument("--state-file", type=Path)
    run_script(main, parser.parse_args())
