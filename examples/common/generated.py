"""How near generated images are to real ones, in numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from common.data import CLASSES


def energy_distance(made: NDArray[Any], real: NDArray[Any]) -> float:
    """Twice the mean distance between the sets, less those within them; zero if both
    are of one distribution, but for chance."""
    within = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (made, real)]
    return float(2 * cdist(made, real).mean() - sum(within))


def classes_made(labels: NDArray[Any]) -> float:
    """How many classes there are, in equal shares: the exponential of the entropy."""
    shares = np.bincount(labels, minlength=CLASSES) / len(labels)
    return float(np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-12)))))
