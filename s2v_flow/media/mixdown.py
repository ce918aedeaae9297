"""Mix sound of more than two channels down to two, so that a voice in the centre keeps its level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

HALF_POWER = 0.5**0.5
_FRONT: Mapping[str, tuple[float, float]] = {  # a channel's shares in left and right, by FFmpeg's names
    "FL": (1, 0),
    "FR": (0, 1),
    "FC": (HALF_POWER, HALF_POWER),
    "FLC": (np.cos(np.pi / 8), np.sin(np.pi / 8)),  # halfway between left and centre, at constant power
    "FRC": (np.sin(np.pi / 8), np.cos(np.pi / 8)),
    "LFE": (0, 0),
}
_SURROUND: Mapping[str, tuple[float, float]] = {"L": (HALF_POWER, 0), "R": (0, HALF_POWER), "C": (0.5, 0.5)}
_LAYOUTS: Mapping[int, tuple[str, ...]] = {  # where a file does not say: as FLAC (RFC 9639, section 9.1.3)
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def to_stereo(samples: NDArray[np.float32], channels: Sequence[str]) -> NDArray[np.float32]:
    """Mix three to eight channels to left and right; their mean is proportional to the recommendation's mono.

    Nothing is attenuated: the sum of loud channels may exceed full scale.

    Args:
        samples: float32 [channels, n].
        channels: FFmpeg's name of each, such as FC; with a name of no place (NONE) the count decides.

    Returns:
        float32 [2, n].

    Source: Recommendation ITU-R BS.775, downward mixing equations for 3/2 material.
    """
    is_known = all(name in _FRONT or name[-1:] in _SURROUND for name in channels)
    names = channels if is_known else _LAYOUTS[len(channels)]
    weights = [_FRONT[name] if name in _FRONT else _SURROUND[name[-1]] for name in names]
    return np.asarray(np.einsum("cn,cs->sn", samples, np.array(weights, np.float32)))
