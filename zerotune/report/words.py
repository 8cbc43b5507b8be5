"""Say in sentences what the tables of a page show."""

from zerotune.errors import quoted
from zerotune.metrics.evaluations import PairedAccuracy
from zerotune.report import html
from zerotune.report.curves import History

CHANCE = 0.05  # a p-value below it is called more than chance explains
NEARLY_ALL, MUCH_MORE, ABOUT_EQUAL = 0.95, 0.15, 0.005
UNTRAINED = "untrained head"  # setting in metrics.json


def answers_of_labels(name: str, metrics: dict) -> list[str]:
    """Return sentences about striking patterns in a model's answers.

    They are guesses of an untrained head, one label given too often, answers that name no label, and an accuracy not
    shown to be above that of one constant answer.

    Args:
        name: of the model in a sentence: "the base model".
        metrics: metrics.json with one label for each item.
    """
    labels = [key.removeprefix("count_") for key in metrics if key.startswith("count_")]
    confusion, count = metrics.get("confusion"), metrics["count"]
    if not confusion or len(labels) != len(confusion):
        return []
    given = [sum(row[number] for row in confusion) / count for number in range(len(labels))]
    held = [sum(row) / count for row in confusion]
    most, sentences = max(range(len(labels)), key=given.__getitem__), []
    label = quoted(labels[most])
    found = f"it gives that answer to {html.percent(given[most])} of the items, and {html.percent(held[most])} have it"
    if metrics.get("setting") == UNTRAINED:
        name = f"{name[0].upper()}{name[1:]}"
        return [f"{name} has a new head that has not been trained: its answers are guesses, whatever they score."]
    if given[most] >= NEARLY_ALL and given[most] - held[most] > 1 - NEARLY_ALL:
        sentences.append(f"{name} answers {label} to nearly everything: {found}.")
    elif given[most] - held[most] >= MUCH_MORE:
        sentences.append(f"{name} answers {label} too often: {found}.")
    unread = metrics.get("unparsable_share") or 0
    if unread >= 1 - NEARLY_ALL:
        sentences.append(f"{html.percent(unread)} of the answers of {name} name no label, and count as wrong.")
    if metrics["accuracy_ci95"][0] <= max(held):
        majority = f"always answering {quoted(labels[held.index(max(held))])}"
        if max(held) - min(held) < ABOUT_EQUAL:
            majority = "giving every item the same answer"
        sentences.append(
            f"{name} is not shown to be better than {majority}, which would be right on {html.percent(max(held))}."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def training_sentence(test: PairedAccuracy, score: str, items: str) -> str:
    """Return what training did to the share of right items, and whether that is more than chance."""
    score = "exact match" if score == "exact" else score
    points = html.change(test)[0].lstrip("+" + html.MINUS)
    verb = "raised" if test.difference > 0 else "lowered"
    p_value = html.p_value_text(test.p_value)
    if test.difference == 0:
        return f"Training left {score} as it was."
    digits = html.digits_of([test.difference])
    scores = f"from {html.percent(test.accuracy_first, digits)} to {html.percent(test.accuracy_second, digits)}"
    if test.p_value < CHANCE:
        return f"Training {verb} {score} by {points}, {scores}: more than chance explains ({p_value})."
    return (
        f"Training {verb} {score} by {points}, {scores}: no more than chance explains on {test.num_common:,} {items} "
        f"({p_value})."
    )


def history_sentences(history: History, best_step: int | None, max_steps: int | None = None) -> list[str]:
    """Return how the validation loss developed, and which step final/ is from.

    Args:
        max_steps: of --max-steps.
    """
    losses = {line["step"]: line["eval_loss"] for line in history.evaluations if line.get("eval_loss") is not None}
    if len(losses) < 2:
        return []
    lowest, (last, last_loss) = min(losses, key=losses.get), list(losses.items())[-1]
    if lowest == last:
        more = f"more steps than --max-steps {max_steps:,}" if last == max_steps else "more epochs"
        sentence = f"Validation loss was still falling at the end: {more} may help."
    elif last_loss > 1.1 * losses[lowest]:
        sentence = (
            f"Validation loss was lowest at step {lowest:,} ({losses[lowest]:.3f}) and rose to {last_loss:.3f} after "
            "it: later steps fit the training rows alone."
        )
    else:
        sentence = f"Validation loss has hardly changed since step {lowest:,}, where it was lowest."
    kept = f" final/ is step {best_step:,} of {last:,}." if best_step and best_step != last else ""
    return [sentence + kept]


def movement_sentence(moved: dict) -> str:
    """Return which weights training moved most and least, "" if that is not known."""
    groups = sorted(moved.get("groups", {}).items(), key=lambda item: item[1])
    if not groups:
        return ""
    (least, small), (most, large) = groups[0], groups[-1]
    said = f"Training moved the {most} weights by {html.percent(large, 2)} of their norm"
    return f"{said}." if most == least else f"{said}, the {least} weights by {html.percent(small, 2)}."


def seeds_sentence(name: str, mean: float, deviation: float | None, low: float, high: float, num: int) -> str:
    """Return how much a score depends on the prompt."""
    if num == 1:
        return (
            f"{html.metric_title(name).capitalize()} is {html.percent(mean)} with one prompt; others may differ much."
        )
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return (
        f"Over {num} prompts, {html.metric_title(name)} is {100 * mean:.1f}{spread} % (mean ± standard deviation), "
        f"from {html.percent(low)} to {html.percent(high)}: the prompt alone moves it by "
        f"{100 * (high - low):.1f} points."
    )
