"""How tests compare numbers: by the largest absolute difference, with a name and the mean difference on failure."""

import numpy as np


def assert_close(name: str, ours, expected, atol: float) -> None:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    error = np.abs(ours - expected)
    worst, mean = error.max(initial=0.0), error.mean() if error.size else 0.0
    assert worst <= atol, f"{name}: max error {worst:.3g}, mean {mean:.3g}, allowed {atol:.3g}"


def assert_equal(name: str, ours, expected) -> None:
    """Bit for bit; NaN equals NaN."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    floats = np.issubdtype(ours.dtype, np.floating)
    same = np.array_equal(ours, expected, equal_nan=bool(floats))
    assert same, f"{name}: {(ours != expected).sum()} of {ours.size} numbers differ"
