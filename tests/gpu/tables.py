"""Show the rows of a run as markdown."""

from benchmarking import markdown_table

PEAK_FLOPS = 989e12  # as in bench.py, which imports torch


def page(facts: dict, rows: list[dict], notes: list[str]) -> str:
    """Return a page of everything that is known so far."""
    measured = [row for row in rows if "error" not in row and "skipped" not in row]
    device = next((row for row in measured if row["name"] == "device"), None)
    parts = [_head(facts, device)]
    parts += [note for note in notes]
    training = [row for row in measured if "tokens_per_s" in row]
    if training:
        parts.append(_training_table(training, device))
    others = [row for row in measured if "tokens_per_s" not in row and row is not device]
    parts += [_other(row) for row in others]
    failed = [line(row) for row in rows if row not in measured]
    if failed:
        parts.append("Not measured:\n\n" + "\n".join(f"- {each}" for each in failed))
    return "\n\n".join(parts) + "\n"


def line(row: dict) -> str:
    """Return one row in one line, for the terminal."""
    reason = row.get("error") or row.get("skipped")
    if reason:
        return f"{row['name']}: {reason}"
    if "tokens_per_s" in row:
        return (
            f"{row['name']}: {row['tokens_per_s']:,.0f} tokens/s, {row['step_s'] * 1e3:.1f} ms a step, "
            f"utilisation {row['utilisation']:.1%} ({row['taken_s']} s)"
        )
    return f"{row['name']}: " + ", ".join(
        f"{name} {_number(value)}" for name, value in row.items() if name not in ("name", "top")
    )


def _head(facts: dict, device: dict | None) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    if device is None:
        return f"{facts['date']}, {versions}"
    toy = " (toy sizes: this shows that the script works, and measures nothing)" if device["toy"] else ""
    return (
        f"{facts['date']}, {device['device']}{toy}, CUDA {device['cuda']}, driver {device['driver']}, {versions}.\n"
        f"A large bf16 matrix product runs at {device['matmul_flops'] / 1e12:,.0f} TFLOP/s here, a large copy at "
        f"{device['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written). Utilisation is of {PEAK_FLOPS / 1e12:.0f} "
        "TFLOP/s, by useful operations on real tokens: see library_step.useful_flops."
    )


def _training_table(rows: list[dict], device: dict | None) -> str:
    by_name = {row["name"]: row for row in rows}
    rate = device["matmul_flops"] if device else None

    def to_trainer(row: dict) -> str:
        kind, *rest = row["name"].split("/")
        trainer = by_name.get("/".join(["trainer", *rest[:4]]))
        plain = kind in ("train", "packed") and not row["name"].endswith(("batch-32", "batch-256"))
        return f"{row['tokens_per_s'] / trainer['tokens_per_s']:.2f} ×" if trainer and plain else "–"

    def memory(row: dict, name: str) -> str:
        return "–" if row.get(name) is None else f"{row[name] / 2**30:.1f}"

    def shown(name: str, form: str):
        return lambda row: "–" if row.get(name) is None else format(row[name], form)

    columns = {
        "measurement": lambda row: row["name"],
        "examples a step": lambda row: str(row["batch_size"]),
        "tokens a step": lambda row: f"{row['tokens_per_step']:,.0f}",
        "micro-batches": shown("micro_batches", ".1f"),
        "ms a step": lambda row: f"{row['step_s'] * 1e3:.1f}",
        "real tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "to Trainer": to_trainer,
        "utilisation": lambda row: f"{row['utilisation']:.1%}",
        "of matmul": lambda row: f"{row['utilisation'] * PEAK_FLOPS / rate:.1%}" if rate else "–",
        "padding": shown("padding", ".2f"),
        "recomputes": lambda row: "yes" if row.get("checkpointing") else "no",
        "fused": lambda row: row.get("passes") or "–",
        "peak GiB": lambda row: memory(row, "peak_bytes"),
        "plan GiB": lambda row: memory(row, "planned_bytes"),
        "waits a step": shown("waits_per_step", ".1f"),
    }
    table = markdown_table(rows, columns)
    extras = [row for row in rows if "packed_logit_error" in row or "compiled_graphs" in row]
    lines = [f"- {row['name']}: " + ", ".join(f"{name} {_number(row[name])}" for name in _EXTRAS if name in row)
             for row in extras]  # fmt: skip
    return table + ("\n\n" + "\n".join(lines) if lines else "")


_EXTRAS = ("packed_logit_error", "padded_logit_error", "compiled_graphs")


def _other(row: dict) -> str:
    if "top" not in row:
        return f"- {line(row)}"
    columns = {
        "kernel": lambda each: each["kernel"].replace("|", "/"),
        "calls a step": lambda each: f"{each['calls']:,.1f}",
        "ms a step": lambda each: f"{each['ms']:.2f}",
        "of all": lambda each: f"{each['ms'] / 1e3 / row['kernel_s']:.1%}",
    }
    return f"{line(row)}\n\n" + markdown_table(row["top"], columns)


def _number(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
