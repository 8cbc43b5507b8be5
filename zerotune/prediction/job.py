"""Rank 0's side of a prediction: rows in, rows with their new columns out."""

import sys
import time
from collections.abc import Iterator
from itertools import chain, islice

from zerotune.errors import Preempted, Refused
from zerotune.files import json_sha256
from zerotune.models.model_files import model_identity
from zerotune.prediction.answering import Answerer
from zerotune.prediction.inputs import Chunk, cut_chunks, find_columns, open_source, skip
from zerotune.prediction.output import (
    FileOutput,
    JsonLines,
    Output,
    PartialRecord,
    PrintedOutput,
    check_columns,
    check_input,
    check_writable,
    output_format,
    readable_line,
    taken_column,
)
from zerotune.prediction.settings import PredictSettings
from zerotune.run.process import installed_version, say
from zerotune.tasks.row_stream import RowDigest

NUM_FIRST_ROWS = 100  # rows that are checked before a weight is loaded
SECONDS_BETWEEN_LINES = 10


class Job:
    """The rows, read once and in order, and their output.

    Args:
        printed: standard output (`take_standard_output`); None with --output.
    Raises:
        Refused: the input cannot be read, its first rows cannot be answered, or the output cannot be written.
    """

    def __init__(self, settings: PredictSettings, answerer: Answerer, printed):
        self.settings, self.asks, self._printed = settings, answerer.asks, printed
        self.stream = open_source(settings.source, answerer.asks)
        self._reader = answerer.reader(find_columns(self.stream, answerer.wanted))
        self.names = {name: settings.prefix + name for name in answerer.columns}
        check_columns(self.stream, list(self.names.values()))
        first = list(islice(self.stream.rows, NUM_FIRST_ROWS))
        self.stream.rows = chain(first, self.stream.rows)
        items = [item for item in map(self._reader.item, first) if item]
        if items:
            answerer.check(items)
        self._identity = self._identify() if settings.resumes else None
        self._format = None
        if settings.output:
            names = list(self.names.values())
            fields = [row.fields for row in first]
            self._format = output_format(settings.output, self.stream, fields, names, self.asks)
            self._format.start()
            self._check_rows([each | dict.fromkeys(names) for each in fields], 1)
        self.output: Output | None = None
        self._chunks = iter(())
        self.num_blank, self.first_blank = 0, None
        self._digest, self._num_done = RowDigest(), 0
        if settings.output:
            self._skip_predicted(check_writable(settings.output, self._identity))

    def _skip_predicted(self, record: PartialRecord | None) -> None:
        """Skip the rows that the output already has. Raises Refused if they have changed."""
        if record is not None:
            self._num_done = record["rows"]
            self.num_blank, self.first_blank = skip(self.stream, self._reader, self._num_done, self._digest)
            check_input(self.settings.output, record, self._digest)

    def _identify(self) -> dict[str, str]:
        """Return hashes of everything the predictions depend on except the input's rows, by name."""
        settings, model = self.settings, self.settings.model
        flags = [settings.source.columns, settings.labels, settings.max_length, settings.prompt_format, settings.top_k]
        parts = {
            "format": self.stream.kind,
            "model": model_identity(model.name, model.revision),
            "flags": [*flags, settings.prefix, model.method, model.attention, model.precision],
            "versions": [installed_version(name) for name in ("torch", "transformers")],
        }
        return {name: json_sha256(value) for name, value in parts.items()}

    def start(self) -> None:
        """Open the output. Raises Refused."""
        if self.settings.output:
            self.output = FileOutput(self.settings.output, self._identity, self._digest)
            if self.output.rows != self._num_done:
                raise Refused(f"another process has written {self.settings.output} since this one started: start again")
            self.output.open(self._format)
        else:
            is_file = self.settings.source.file is not None
            self.output = PrintedOutput(self._printed, JsonLines().encode if is_file else self._readable)
        if self.output.rows:
            say(f"{self.output.rows:,} rows are predicted already")
        self._chunks = cut_chunks(self.stream.rows, self._reader, self.settings.tokens_per_device)
        self._first_row, self._started = self.output.rows, time.monotonic()
        self._next_line = self._started + SECONDS_BETWEEN_LINES

    def _readable(self, rows: list[dict]) -> bytes:
        lines = (readable_line(row, self.settings.prefix) for row in rows)
        return "".join(f"{line}\n" for line in lines).encode()

    def read(self, most: int) -> list[Chunk]:
        """Return the next chunks, [] at the end. If a row cannot be read, save the predictions and raise Refused."""
        try:
            return list(islice(self._chunks, most))
        except Refused:
            self._save_predicted()
            raise

    def write(self, chunks: list[Chunk], answers: list[list[dict]]) -> None:
        """Write the first chunks, as many as have answers.

        Raises:
            Refused: a new column's name is taken, or the output's format cannot hold a row.
        """
        for chunk, found in zip(chunks, answers, strict=False):
            rows = self._joined(chunk, iter(found))
            try:
                self.output.add(rows, chunk.rows)
            except Refused:
                self._save_predicted()
                if self._format:
                    self._check_rows(rows, self.output.rows + 1)
                raise
        if time.monotonic() >= self._next_line:
            position = self.stream.position()
            part = "" if position is None else f" ({position:.0%} of {self.stream.name})"
            print(f"{self.output.rows:,} rows{part}, {self._rate():,.1f} rows/s", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def _joined(self, chunk: Chunk, answers: Iterator[dict]) -> list[dict]:
        rows, new = [], self.names.values()
        for number, (fields, item) in enumerate(zip(chunk.rows, chunk.items, strict=True), self.output.rows + 1):
            taken = next((name for name in new if name in fields), None)
            if taken:
                raise taken_column(f"{self.stream.name} row {number}", taken)
            if item is None:
                self.num_blank += 1
                self.first_blank = self.first_blank or number
            found = next(answers) if item else {}
            rows.append(fields | {name: found.get(key) for key, name in self.names.items()})
        return rows

    def _check_rows(self, rows: list[dict], first_row: int) -> None:
        """Refuse the first of some rows that the output's format cannot hold, with its number."""
        for number, row in enumerate(rows, first_row):
            try:
                self._format.encode([row])
            except Refused as refusal:
                raise Refused(f"{self.stream.name} row {number}: {refusal}") from None

    def _save_predicted(self) -> None:
        """Save the predictions so far, because the command is about to be refused."""
        if self.output.rows:
            self.output.save()

    def _rate(self) -> float:
        return (self.output.rows - self._first_row) / max(time.monotonic() - self._started, 1e-9)

    def stop(self, stop_signal) -> Preempted:
        """Save, and return the exception that ends the process."""
        self.output.save()
        kept = "the same command continues there" if self.settings.resumes else "nothing can be resumed"
        return stop_signal.stopped(f"stopped by {{name}} after {self.output.rows:,} rows: {kept}")

    def finish(self) -> None:
        """Complete the output, and report it."""
        self.output.finish()
        if self.num_blank:
            found = "1 row has" if self.num_blank == 1 else f"{self.num_blank:,} rows have"
            say(f"{found} no text and got no prediction; the first is row {self.first_blank:,}")
        if self.settings.output:
            say(f"wrote {self.output.rows:,} predictions ({self._rate():,.1f} rows/s): {self.settings.output}")
