"""Compare runs: their curves, their weights, their bits, and the contents of their folders.

All runs compute the same float32 sums in different orders. Each term differs by 1 part in 2^24, which Adam's division
by small second moments amplifies over the steps. Measured on 8 steps: losses within 6e-7 of each other, gradient norms
within 8e-7, relative. CURVE leaves a factor of 12 for other kernels; a wrong normaliser, a lost micro-batch or a rank
that counts twice moves the curve by at least 1e-2.
"""

from launching import Launch
from safetensors.torch import load_file

from zerotune.training.checkpoints import newest_whole

CURVE = 1e-5
# A weight whose gradient is only rounding can move by the learning rate (1e-3) in Adam's first steps. Measured: 1.4e-5.
WEIGHTS = 1e-4
# bf16 keeps 8 bits: a unit is 2^-8, and an example's activations round differently in a batch of another shape.
# Measured: losses within 2.2e-3, gradient norms within 3.2e-3. Four units allow for other CPUs' kernels.
BF16_CURVE = 2**-6
OFTEN = ["--checkpoint-every", 2, "--eval-every", 4, "--keep-checkpoints", 1]


def steps_of(run):
    return [row for row in run.read_lines("metrics.jsonl") if "loss" in row]


def differences(run, reference):
    """Return the largest relative differences of losses and of gradient norms; the rest of the lines must be equal."""
    ours, theirs = steps_of(run), steps_of(reference)
    assert [row["step"] for row in ours] == list(range(1, len(theirs) + 1))
    for name in ("step", "epoch", "learning_rate", "tokens"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    return {
        name: float(max(abs(a[name] / b[name] - 1) for a, b in zip(ours, theirs, strict=True)))
        for name in ("loss", "grad_norm")
    }


def weights_of(run):
    (file,) = (run.folder / "final").glob("*.safetensors")
    return load_file(file)


def weight_difference(run, reference):
    ours, theirs = weights_of(run), weights_of(reference)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same_curve(run, reference, bound=CURVE):
    found = differences(run, reference)
    print(run.folder.name, found, "weights", weight_difference(run, reference))  # shown by pytest -rP
    assert max(found.values()) <= bound, found


def numbers(run: Launch) -> list[dict]:
    """Return metrics.jsonl without the numbers that depend on a clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in run.read_lines("metrics.jsonl")]


def assert_same_bits(run: Launch, reference: Launch):
    assert numbers(run) == numbers(reference)
    ours, theirs = weights_of(run), weights_of(reference)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    for name in ("predictions.jsonl", "metrics.json"):
        same = [(one.folder / "eval" / "final" / name).read_text() for one in (run, reference)]
        assert same[0].replace(str(run.folder), "") == same[1].replace(str(reference.folder), "")


def newest_step(run: Launch) -> int | None:
    folder, _ = newest_whole(run.folder / "checkpoints")
    return None if folder is None else int(folder.name.removeprefix("step-"))


def killed_at(event, path, occurrence=1, do="SIGKILL"):
    return {"on_event": {"event": event, "path": path, "occurrence": occurrence, "do": do}}
