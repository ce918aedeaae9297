"""Files to arrays and back: sound, images, video. No torch; each module imports the libraries that it needs.

Here is where a picture is cut to another shape: arithmetic alone, which planning needs as well.
"""

from __future__ import annotations


def centre_cut(columns: int, rows: int, aspect: float) -> tuple[int, int]:
    """Return what is cut off a picture about its centre to give it the aspect ratio width / height.

    Returns:
        How many columns on the left and on the right each, and how many rows above and below. All of them, where the
        picture is too narrow to be cut to that shape.

    Source: the project's spec, section 6.
    """
    have = columns / rows
    cut_x = round((columns - columns * (aspect / have)) / 2) if have > aspect else 0  # round half to even
    cut_y = round((rows - rows * (have / aspect)) / 2) if have < aspect else 0
    return cut_x, cut_y


def can_be_cut(columns: int, rows: int, aspect: float) -> bool:
    """Tell whether `centre_cut` leaves anything."""
    cut_x, cut_y = centre_cut(columns, rows, aspect)
    return columns > 2 * cut_x and rows > 2 * cut_y
