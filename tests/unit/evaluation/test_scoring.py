"""Every item is scored once, with any number of processes, and scores on disk are not computed again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zerotune.errors import Refused
from zerotune.evaluation import scoring
from zerotune.evaluation.scoring import BackOff, PartialScores, is_finite, score_items
from zerotune.training.batches import evaluation_batches

BATCHES = [np.array([4, 0]), np.array([3]), np.array([1, 5]), np.array([2])]
KEY = {"model": "a", "items": "b"}


def score(rows):
    """Return numbers that need all digits of float32, so a conversion through text would show."""
    values = np.stack([rows / 3, np.pi * rows - 1], axis=1).astype(np.float32)
    return [{"numbers": pair, "tokens": [0] * number} for pair, number in zip(values.tolist(), rows, strict=True)]


ALL = score(np.arange(6))


def alone(rank=0, world=1):
    cpu = torch.device("cpu")
    return SimpleNamespace(device=cpu, num_processes=world, process_index=rank, wait_for_everyone=lambda: None)


def counting(calls):
    def counted(rows):
        calls.append(rows.tolist())
        return score(rows)

    return counted


def test_records_come_back_in_item_order():
    calls = []
    assert score_items(counting(calls), BATCHES, alone()) == ALL
    assert calls == [batch.tolist() for batch in BATCHES]


def test_a_cpu_gives_memory_back_after_each_batch(monkeypatch):
    given_back = []
    monkeypatch.setattr(scoring, "give_back_memory", lambda at_once=False: given_back.append(at_once))
    score_items(score, BATCHES, alone())
    assert given_back == [True, *[False] * len(BATCHES), True]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_batches_and_call_equally_often(world, monkeypatch):
    """Each rank's results are gathered; a rank without work repeats a batch whose result does not count."""
    shares, calls = [], [[] for _ in range(world)]

    def share(done, accelerator):
        shares.append(done)
        return {number: score(batch) for number, batch in enumerate(BATCHES)}

    monkeypatch.setattr(scoring, "_share", share)
    for rank in range(world):
        assert score_items(counting(calls[rank]), BATCHES, alone(rank, world)) == ALL
    assert sorted(number for done in shares for number in done) == [0, 1, 2, 3]
    assert len({len(of_rank) for of_rank in calls}) == 1


def test_partial_records_survive_bit_for_bit(tmp_path):
    kept = PartialScores(tmp_path, KEY)
    kept.open(0)
    for number in (0, 2):
        kept.add(number, score(BATCHES[number]))
    again = PartialScores(tmp_path, dict(reversed(KEY.items()))).read()
    assert again == {number: score(BATCHES[number]) for number in (0, 2)}


def test_an_interrupted_evaluation_scores_only_the_rest(tmp_path):
    calls = []

    def dies_in_the_third(rows):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counting(calls)(rows)

    with pytest.raises(KeyboardInterrupt):
        score_items(dies_in_the_third, BATCHES, alone(), PartialScores(tmp_path, KEY))
    rest = []
    partial = PartialScores(tmp_path, KEY)
    assert score_items(counting(rest), BATCHES, alone(), partial) == ALL
    assert calls == [[4, 0], [3]] and rest == [[1, 5], [2]]
    partial.delete()
    assert list(tmp_path.iterdir()) == []


def test_files_of_more_ranks_than_now_are_read(tmp_path):
    for rank in (0, 1):
        kept = PartialScores(tmp_path, KEY)
        kept.open(rank)
        kept.add(rank, score(BATCHES[rank]))
    calls = []
    assert score_items(counting(calls), BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL
    assert calls == [[1, 5], [2]]


def test_a_torn_last_line_is_scored_again(tmp_path):
    kept = PartialScores(tmp_path, KEY)
    kept.open(0)
    kept.add(0, score(BATCHES[0]))
    kept.add(1, score(BATCHES[1]))
    path = tmp_path / ".partial" / "rank-0.jsonl"
    path.write_text(path.read_text()[:-5])
    assert PartialScores(tmp_path, KEY).read().keys() == {0}
    calls = []
    assert score_items(counting(calls), BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL
    assert calls == [[3], [1, 5], [2]]


@pytest.mark.parametrize(
    "line",
    [
        '{"batch": 1}',
        '{"batch": 1, "records": 7, "sha256": ""}',
        '{"batch": 1, "records": [{"numbers": ["x"]}], "sha256": "5a"}',
        '{"batch": "1", "records": [], "sha256": "5a"}',
        '{"batch": 1, "records": [{"numbers": [NaN]}]}',
        "[]",
        "junk",
    ],
)
def test_lines_of_another_shape_are_scored_again(tmp_path, line):
    kept = PartialScores(tmp_path, KEY)
    kept.open(0)
    kept.add(0, score(BATCHES[0]))
    with (tmp_path / ".partial" / "rank-0.jsonl").open("a") as file:
        file.write(line + "\n")
    assert score_items(score, BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL
    assert PartialScores(tmp_path, KEY).read().keys() == {0, 1, 2, 3}


def test_a_kept_score_that_was_changed_is_scored_again(tmp_path):
    kept = PartialScores(tmp_path, KEY)
    kept.open(0)
    kept.add(0, score(BATCHES[0]))
    path = tmp_path / ".partial" / "rank-0.jsonl"
    path.write_text(path.read_text().replace("-1.0", "-2.0"))
    assert PartialScores(tmp_path, KEY).read() == {}
    assert score_items(score, BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL


def test_a_file_in_the_place_of_the_folder_is_replaced(tmp_path):
    (tmp_path / ".partial").touch()
    assert score_items(score, BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL


def test_scores_of_another_evaluation_are_not_used(tmp_path):
    other = PartialScores(tmp_path, {**KEY, "items": "c"})
    other.open(0)
    other.add(0, [{"numbers": [0.0, 0.0]}] * 2)
    assert PartialScores(tmp_path, KEY).read() == {}
    assert score_items(score, BATCHES, alone(), PartialScores(tmp_path, KEY)) == ALL
    assert PartialScores(tmp_path, {**KEY, "items": "c"}).read() == {}


def test_a_batch_that_is_missing_is_a_bug(monkeypatch):
    monkeypatch.setattr(scoring, "_share", lambda done, accelerator: {0: done[0]})
    with pytest.raises(AssertionError, match="every batch is scored"):
        score_items(score, BATCHES, alone())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(number):
    record = {"null": 0.5, "spans": [[1.0, 0, 3], [-2.0, 4, 5]], "tokens": []}
    assert is_finite(record)
    assert not is_finite(record | {"null": number})
    assert not is_finite(record | {"spans": [[1.0, 0, 3], [number, 4, 5]]})


# --- out of memory ---

LENGTHS = np.array([30, 3, 12, 5, 5, 28, 9, 1])


LENGTHS_ALIKE = np.full(8, 30)


def fits(most_tokens, calls, lengths=LENGTHS):
    """Score, but if a batch is too large ask torch for more memory than any machine has."""

    def scored(items):
        calls.append(items.tolist())
        torch.empty(2**60 if lengths[items].max() * len(items) > most_tokens else 1, dtype=torch.uint8)
        return score(items)

    return scored


@pytest.mark.parametrize("most_tokens", [30, 40, 70, 10_000])
def test_a_batch_that_does_not_fit_is_scored_in_parts(most_tokens, capsys):
    calls = []
    back_off = BackOff(fits(most_tokens, calls), LENGTHS)
    scores = score_items(back_off, evaluation_batches(LENGTHS, 120), alone())
    assert scores == score(np.arange(8))
    done = [item for call in calls if LENGTHS[call].max() * len(call) <= most_tokens for item in call]
    assert sorted(done) == list(range(8)), "each once"
    assert ("out of memory: continuing with" in capsys.readouterr().out) == (most_tokens < 120)


def test_the_smaller_budget_is_kept():
    """Batches of 120 do not fit: the first fails, and the second is then cut without being tried."""
    calls = []
    back_off = BackOff(fits(60, calls, LENGTHS_ALIKE), LENGTHS_ALIKE)
    for batch in (np.arange(4), np.arange(4, 8)):
        back_off(batch)
    assert calls == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_item_that_does_not_fit_alone_is_refused():
    with pytest.raises(Refused, match="out of memory on a single item of 30 tokens: use fewer --shots"):
        score_items(BackOff(fits(20, []), LENGTHS), evaluation_batches(LENGTHS, 120), alone())


def test_a_gpus_other_words_for_it_are_known_too():
    def score_one(items):
        if len(items) > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return score(items)

    items = np.arange(4)
    assert BackOff(score_one, LENGTHS_ALIKE)(items) == score(items)


def test_another_error_is_no_lack_of_memory():
    def broken(items):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        BackOff(broken, LENGTHS)(np.arange(3))
