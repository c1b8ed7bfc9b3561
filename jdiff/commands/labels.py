"""Labels as words: numbers, ranges, names of classes, or all of them."""

import difflib
import re
from collections.abc import Sequence

from jdiff.errors import UserError


def parse(text: str, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """The labels that `--labels` means, in the order given.

    Args:
      text: `all`, or parts joined by commas: a number, a range `2-5` (both ends included), or the
        name of a class.
      num_classes: labels run from 0 to num_classes - 1; 0 for a model without labels.
      names: of the classes.

    Raises:
      UserError: a label out of range, an unknown name (the nearest is offered), or a model without
        labels.

    >>> parse("cat,0-2", 10, cifar10_names)
    [3, 0, 1, 2]
    """
    if not num_classes:
        raise UserError(f"--labels={text}: the model was trained without labels.")
    if text.strip().lower() == "all":
        return list(range(num_classes))
    by_name = {name.lower(): i for i, name in enumerate(names)}
    found: list[int] = []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", part)
        if re.fullmatch(r"-?\d+", part):
            found.append(_inside(int(part), num_classes))
        elif part.lower() in by_name:
            found.append(by_name[part.lower()])
        elif span:
            low, high = (_inside(int(end), num_classes) for end in span.groups())
            if low > high:
                raise UserError(f"--labels: the range {part} is empty; write {high}-{low}.")
            found += range(low, high + 1)
        else:
            raise UserError(f"--labels: {_unknown(part, list(names), num_classes)}")
    return found


def _inside(label: int, num_classes: int) -> int:
    if not 0 <= label < num_classes:
        raise UserError(f"--labels: {label} is out of range; labels are 0 to {num_classes - 1}.")
    return label


def _unknown(part: str, names: list[str], num_classes: int) -> str:
    near = difflib.get_close_matches(part, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = [name for name in names if not name.isdigit()]
    known = f" Names: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}." if shown else ""
    return f"{part!r} is no label.{hint} Labels are 0 to {num_classes - 1}, or `all`.{known}"
