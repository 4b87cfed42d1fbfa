"""A convolution's kernel as the taps between all pixels of a tiny map, for a matrix product in the convolution's place.

Owns: which tap joins which two pixels. Does not know: runtimes, how a matrix is laid out.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray


def all_taps(weight: NDArray[Any], height: int, width: int, stride: int) -> NDArray[Any]:
    """Give (out, rows, columns, in, height, width): what each input pixel is multiplied by for each output pixel.

    ``weight`` is (out, in, k, k), k odd, of a convolution padded by half of its kernel; rows and columns are those of its
    output over maps of ``height`` x ``width``. Pixels that no tap joins get 0.
    """
    (out_width, in_width, kernel, _), half = weight.shape, weight.shape[2] // 2
    rows, columns = -(-height // stride), -(-width // stride)
    taps = np.zeros((out_width, rows, columns, in_width, height, width), weight.dtype)
    for row, column, y, x in product(range(rows), range(columns), range(height), range(width)):
        tap_y, tap_x = y - row * stride + half, x - column * stride + half
        if 0 <= tap_y < kernel and 0 <= tap_x < kernel:
            taps[:, row, column, :, y, x] = weight[:, :, tap_y, tap_x]
    return taps
