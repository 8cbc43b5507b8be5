"""The bytes that the devices of a run send each other in a step, and the time they wait for them. Pure arithmetic."""

from dataclasses import dataclass

from zerotune.run.plan import LIVE_WEIGHTS, Sharding

BACKWARD = 2 / 3  # of the time of a micro-batch


@dataclass(frozen=True)
class Weights:
    """Counts of weights: of linear layers, which DeepSpeed sends in the run's precision, and of others, in float32."""

    linear: float
    other: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.other

    def num_bytes(self, narrow: int) -> float:
        """Return the bytes that DeepSpeed sends for them, `narrow` for each weight of a linear layer."""
        return self.linear * narrow + self.other * 4


@dataclass(frozen=True)
class Exchange:
    """Bytes that one device sends in a step.

    Attributes:
        gradients: sent during backward passes.
        weights: weights that ZeRO-3 gathers before layers use them.
        updated: weights that ZeRO-1 and 2 gather after the update.
        times: how often gradients are sent in a step.
    """

    gradients: float
    weights: float = 0.0
    updated: float = 0.0
    times: int = 1

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.gradients + self.weights + self.updated


def step_exchange(
    trained: Weights, everything: Weights, narrow: int, sharding: Sharding, num_micro_batches: int, plain: int = 4
) -> Exchange:
    """Return the bytes that a device sends in a step.

    In a ring of n devices an all-reduce sends 2 (n - 1) / n of a tensor, a reduce-scatter or all-gather half of that.
    ZeRO-1 and 2 all-reduce gradients too (DeepSpeed 0.19, use_multi_rank_bucket_allreduce).

    Args:
        trained: weights that train; everything: those and the frozen ones.
        narrow: bytes of a number in the run's precision.
        plain: bytes of a gradient that is exchanged without DeepSpeed.
    """
    stage, part = sharding.stage, 1 - 1 / sharding.devices
    if stage == 0:
        return Exchange(2 * part * plain * trained.total)
    times = 1 if stage == 1 or sharding.whole_gradients else num_micro_batches
    gradients = times * part * trained.num_bytes(narrow)
    if stage < 3:
        return Exchange(2 * gradients, updated=part * 4 * trained.total, times=times)
    # gathered for the forward pass and again for the backward pass, except the last layers, which are kept
    kept = min(
        sharding.key("stage3_max_live_parameters", LIVE_WEIGHTS),
        sharding.key("stage3_max_reuse_distance", LIVE_WEIGHTS),
        everything.total,
    )
    passes = num_micro_batches * (2 - kept / everything.total)
    return Exchange(gradients, weights=passes * part * everything.num_bytes(narrow), times=times)


def exchanged_weights(table: dict, method: str) -> tuple[Weights, Weights]:
    """Return the weights that train, and all weights, from `parameter_table`'s counts and a --method."""
    groups = table["groups"]
    layers = groups["attention"] + groups["mlp"]
    trained = layers if method == "full" else table["trainable"] - groups["head"]
    return Weights(trained, table["trainable"] - trained), Weights(layers, table["total"] - layers)


def efficiency(
    sent: Exchange, seconds: float, num_micro_batches: int, bytes_per_second: float, overlaps: bool = True
) -> float:
    """Return the share of a step's time in which a device computes.

    Gradients are sent during backward passes, ZeRO-3's weights and gradients during all computing, and updated weights
    after it. Without `overlaps` nothing is sent while a device computes.

    Args:
        seconds: the time in which all micro-batches compute.
    """
    if not overlaps:
        return seconds / (seconds + sent.total / bytes_per_second)
    hidden = seconds if sent.weights else sent.times * BACKWARD * seconds / num_micro_batches
    waited = max(0.0, (sent.gradients + sent.weights) / bytes_per_second - hidden) + sent.updated / bytes_per_second
    return seconds / (seconds + waited)
