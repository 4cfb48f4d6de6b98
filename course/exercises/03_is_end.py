from segment import (ABBREVIATED, GOES_ON, INSIDE, MARK_END, OPENING, WIDE_END, ends_line,
                     one_holds, starts_item)


def is_end(before: str, gap: str, after: str) -> bool:
    """Whether a sentence ends at a gap. If `after` grows, a no can become a yes, but a yes stays.

    Most conditions read only its first character. `NEXT_MARKER`, `OPENING` and the patterns of
    `ends_line` read more: once they match, they stay matched, and a match is a reason for an end.
    The rules "before what closes" and "before a bracketed or Roman number" read two characters or
    more: they can stop matching, and a match is a reason against an end.
    """
    raise NotImplementedError
