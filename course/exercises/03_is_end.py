from segment import (ABBREVIATED, GOES_ON, INSIDE, MARK_END, OPENING, WIDE_END, ends_line,
                     one_holds, starts_item)


def is_end(before: str, gap: str, after: str) -> bool:
    """Whether a sentence ends at a gap. If `after` grows, a no can become a yes, but a yes stays.

    Most conditions read only its first character. `NEXT_MARKER`, `ITEM` and `OPENING` read more:
    once they match, they stay matched, and a match is a reason for an end. "Before what closes"
    reads two: it can stop matching, and a match is a reason against an end.
    """
    raise NotImplementedError
