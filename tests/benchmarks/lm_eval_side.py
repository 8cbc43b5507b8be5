"""The other side of lm_eval_few_shot.py: lm-evaluation-harness scores a prompt file, in its own environment.

    lm-eval-venv/bin/python tests/benchmarks/lm_eval_side.py MODEL_FOLDER PROMPTS RESULT --batch-size 1 --items 40

PROMPTS has "contexts" and "answers"; RESULT gets "seconds" and "processor_s", which leave out imports and loading the
model, and "log_likelihoods" [items][answers].
"""

import argparse
import json
import time
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--items", type=int, required=True, help="how many of the first contexts are scored")
    args = parser.parse_args()
    given = json.loads(args.prompts.read_text())
    harness = HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=args.batch_size)
    started, worked = time.perf_counter(), time.process_time()
    requests = [
        Instance("loglikelihood", doc={}, arguments=(context, answer), idx=index)
        for context in given["contexts"][: args.items]
        for index, answer in enumerate(given["answers"])
    ]
    sums = [log_likelihood for log_likelihood, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    size = len(given["answers"])
    scores = [sums[start : start + size] for start in range(0, len(sums), size)]
    taken = {"seconds": time.perf_counter() - started, "processor_s": time.process_time() - worked}
    args.result.write_text(json.dumps(taken | {"log_likelihoods": scores}))


if __name__ == "__main__":
    main()
