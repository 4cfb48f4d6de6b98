from segment import (ABBREVIATED, GOES_ON, INSIDE, MARK_END, OPENING, WIDE_END, ends_line,
                     one_holds, starts_item)


def is_end(before: str, gap: str, after: str) -> bool:
    """Whether a sentence ends at a gap. A longer `after` can change no to yes, but never back."""
    raise NotImplementedError
