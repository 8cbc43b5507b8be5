"""Make windows and choose spans as transformers' run_qa.py does: the other side of span_pipeline.py.

Written from its description, not copied: a datasets table mapped in batches of 1,000, and Python loops.
"""

import time
from collections import defaultdict

import datasets
import numpy as np


def features_as_run_qa(questions, tokenizer, max_length: int, stride: int) -> tuple[float, dict[str, np.ndarray]]:
    """Map a table of questions to a table of padded windows.

    Returns:
        Seconds, and the arrays: "ids" of all rows without padding, "lengths" of the rows, "labels" [rows, 2].
    """
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(
        {
            "question": [one.text for one in questions],
            "context": [one.paragraph.context for one in questions],
            "start": [one.answers[0].start if one.answers else -1 for one in questions],
            "text": [one.answers[0].text if one.answers else "" for one in questions],
        }
    )

    def prepare(rows: dict) -> dict:
        windows = tokenizer(
            [question.lstrip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        owners, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
        windows["start_positions"], windows["end_positions"] = [], []
        for number, owner in enumerate(owners):
            start, stop = rows["start"][owner], rows["start"][owner] + len(rows["text"][owner])
            first, last = _place(windows.sequence_ids(number), offsets[number], start, stop)
            windows["start_positions"].append(first)
            windows["end_positions"].append(last)
        return windows

    started = time.perf_counter()
    mapped = table.map(prepare, batched=True, remove_columns=table.column_names)
    seconds = time.perf_counter() - started
    ids, lengths, labels = [], [], []
    for batch in mapped.with_format("numpy").iter(4096):
        mask = batch["attention_mask"] == 1
        ids.append(batch["input_ids"][mask])
        lengths.append(mask.sum(axis=1))
        labels.append(np.stack([batch["start_positions"], batch["end_positions"]], axis=1))
    ids, lengths, labels = map(np.concatenate, (ids, lengths, labels))
    return seconds, {"ids": ids, "lengths": lengths, "labels": labels}


def _place(sequences: list, offsets: list, start: int, stop: int) -> tuple[int, int]:
    """Return the first and last token of the characters from start to stop; 0 and 0 if the window lacks them."""
    first, last = 0, len(sequences) - 1
    while sequences[first] != 1:
        first += 1
    while sequences[last] != 1:
        last -= 1
    if start < 0 or offsets[first][0] > start or offsets[last][1] < stop:
        return 0, 0
    while first < len(offsets) and offsets[first][0] <= start:
        first += 1
    while offsets[last][1] >= stop:
        last -= 1
    return first - 1, last + 1


def select_as_run_qa(
    questions, tokenizer, logits: np.ndarray, num_best: int, max_answer_length: int
) -> tuple[float, dict[str, dict]]:
    """Turn logits into texts with scores and probabilities, question by question, window by window, pair by pair.

    The windows are rows of a datasets table that are read one by one, as in run_qa.py.

    Args:
        logits: float32 [windows, max_length, 2], of windows that share 128 tokens.
    Returns:
        Seconds, and for each question id the best span's "text" and "score", and the "null" score.
    """
    windows = datasets.Dataset.from_dict(_windows_with_places(questions, tokenizer, logits.shape[1]))
    started = time.perf_counter()
    own = defaultdict(list)
    for number, window in enumerate(windows):
        own[window["question"]].append(number)
    found, every_best = {}, {}
    for number, question in enumerate(questions):
        best, null = _best_of_question(own[number], logits, windows, num_best, max_answer_length)
        for span in best:
            start, stop = span.pop("chars")
            span["text"] = question.paragraph.context[start:stop]
        scores = np.array([span["score"] for span in best] + [null])
        odds = np.exp(scores - scores.max())
        for span, probability in zip(best, odds / odds.sum(), strict=False):
            span["probability"] = probability
        own_best = [{name: _plain(value) for name, value in span.items()} for span in best]
        text, score = (own_best[0]["text"], own_best[0]["score"]) if best else ("", None)
        found[question.id] = {"text": text, "score": score, "null": float(null)}
        every_best[question.id] = own_best
    seconds = time.perf_counter() - started
    return seconds, found


def _windows_with_places(questions, tokenizer, max_length: int) -> dict[str, list]:
    """Return each window's question, and the characters of its context tokens (None for other tokens)."""
    windows = tokenizer(
        [question.text.lstrip() for question in questions],
        [question.paragraph.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=128,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    places = [
        [pair if sequence == 1 else None for pair, sequence in zip(pairs, windows.sequence_ids(number), strict=True)]
        for number, pairs in enumerate(windows["offset_mapping"])
    ]
    return {"question": windows["overflow_to_sample_mapping"], "offset_mapping": places}


def _plain(value):
    """Turn NumPy's number into Python's."""
    return float(value) if isinstance(value, np.floating) else value


def _best_of_question(
    numbers: list[int], logits: np.ndarray, windows, num_best: int, max_answer_length: int
) -> tuple[list[dict], float]:
    """Return the best spans of a question's windows, and the lowest null score."""
    spans, null = [], None
    for number in numbers:
        start, end = logits[number, :, 0], logits[number, :, 1]
        score = start[0] + end[0]
        null = score if null is None or score < null else null
        pairs = windows[number]["offset_mapping"]
        firsts = np.argsort(start)[-1 : -num_best - 1 : -1].tolist()
        lasts = np.argsort(end)[-1 : -num_best - 1 : -1].tolist()
        for first in firsts:
            for last in lasts:
                if first >= len(pairs) or last >= len(pairs) or pairs[first] is None or pairs[last] is None:
                    continue
                if last < first or last - first + 1 > max_answer_length:
                    continue
                chars = (pairs[first][0], pairs[last][1])
                score = start[first] + end[last]
                spans.append({"chars": chars, "score": score, "start_logit": start[first], "end_logit": end[last]})
    return sorted(spans, key=lambda span: span["score"], reverse=True)[:num_best], null
