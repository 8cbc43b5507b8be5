"""The ranks' side of a prediction: in each round every rank answers a chunk, and rank 0 reads and writes all chunks."""

from collections.abc import Callable, Iterator
from itertools import takewhile

import torch

from zerotune.errors import Refused
from zerotune.evaluation.scoring import PreparedModel
from zerotune.prediction.answering import answer_chunk
from zerotune.prediction.inputs import Chunk, Item
from zerotune.prediction.job import Job
from zerotune.run.launch import from_rank_0, on_all_ranks

Prepare = Callable[[list[Item]], PreparedModel]


def rounds(accelerator, job: Job | None) -> Iterator[list[Chunk]]:
    """Yield chunks, one for each rank and fewer at the end; all ranks take part.

    Args:
        job: None on all ranks except 0; their chunks have items but no rows.
    """
    read = []

    def read_items() -> list[Chunk]:
        read[:] = job.read(accelerator.num_processes)
        return [Chunk([], chunk.items) for chunk in read]

    while shared := from_rank_0(accelerator, read_items):
        yield read or shared


def answer_round(
    accelerator, prepare: Prepare, chunks: list[Chunk], stop_signal
) -> tuple[list[list[dict]], str | None]:
    """Answer the chunks of a round, one on each rank; all ranks take part.

    Returns:
        The new columns of each chunk's items, up to the first chunk that is not fully answered; and the signal that
        asked a rank to stop, or None.
    Raises:
        Refused: on all ranks, if one of them cannot answer its chunk.
    """
    rank = accelerator.process_index
    items = [item for item in chunks[rank].items if item] if rank < len(chunks) else []
    try:
        found, refusal = _answers(prepare, items, accelerator.device, stop_signal), None
    except Refused as error:
        found, refusal = None, str(error)
    gathered = on_all_ranks(accelerator, (found, refusal, stop_signal.name))
    for _, refusal, _ in gathered:
        if refusal is not None:
            raise Refused(refusal)
    whole = takewhile(lambda each: each is not None, (each for each, _, _ in gathered[: len(chunks)]))
    return list(whole), next((name for _, _, name in gathered if name), None)


def _answers(prepare: Prepare, items: list[Item], device: torch.device, stop_signal) -> list[dict] | None:
    if not items:
        return []
    try:
        answering = prepare(items)
    except Refused as error:
        raise Refused(f"in the chunk that starts at {items[0].where}: {error}") from error
    return answer_chunk(answering, device, lambda: stop_signal.name is not None)
