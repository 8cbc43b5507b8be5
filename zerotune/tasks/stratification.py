"""Draw rows that may have several labels each, so that every label gets its share. Pure functions of numbers."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

_NO_LABEL = -1  # takes the place of a label for rows without one


def draw_iteratively(label_sets: Sequence[tuple[int, ...]], size: int, order: Iterable[int]) -> list[int]:
    """Return the sorted positions of `size` rows, with about the same share of each label's rows as of all rows.

    Iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011, ECML PKDD, algorithm 1) into two parts: take the
    label with the fewest rows left, and give each of its rows to the part that lacks most rows of that label, or else
    most rows in all. A full part takes no more rows, so that the size is exact.

    Args:
        label_sets: the indices of each row's labels; () for a row without one.
        order: all positions, in the order in which a label's rows are taken.
    """
    sets, share = [labels or (_NO_LABEL,) for labels in label_sets], size / len(label_sets)
    rows: dict[int, list[int]] = defaultdict(list)
    for position in order:
        for label in sets[position]:
            rows[label].append(position)
    num_left = {label: len(positions) for label, positions in rows.items()}
    lacking = {label: [number * (1 - share), number * share] for label, number in num_left.items()}  # rest, drawn
    rows_lacking = [len(sets) - size, size]
    part_of: dict[int, int] = {}
    while num_left:
        label = min(num_left, key=lambda each: (num_left[each], each))
        for position in rows[label]:
            if position in part_of:
                continue
            part = max((0, 1), key=lambda each: (rows_lacking[each] > 0, lacking[label][each], rows_lacking[each]))
            part_of[position] = part
            rows_lacking[part] -= 1
            for each in sets[position]:
                lacking[each][part] -= 1
                if each in num_left:
                    num_left[each] -= 1
        del num_left[label]
    return sorted(position for position, part in part_of.items() if part)
