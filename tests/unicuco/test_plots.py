from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from unicuco.errors import StorageError
from unicuco.plots import plot_front, plot_strategies
from unicuco.types import Prediction


@dataclass(frozen=True)
class Point:
    sparsity: float
    kl: Prediction


FRONT = [
    Point(s, Prediction(mean=s**3, lo95=0.8 * s**3, hi95=1.3 * s**3)) for s in (0.6, 0.2, 0.0, 0.9)
]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_the_front_is_a_png_even_with_zeros_on_its_logarithmic_axis(tmp_path: Path) -> None:
    path = tmp_path / "front.png"
    plot_front(path, FRONT, [(0.5, 0.2), (0.0, 0.0)], [(0.3, 0.1)], fisher=[(0.3, 0.09)])
    width, height = png_size(path)
    assert width > 800
    assert height > 500
    assert list(tmp_path.iterdir()) == [path]


def test_a_front_without_rivals_or_measurements_is_drawn_too(tmp_path: Path) -> None:
    plot_front(tmp_path / "a.png", FRONT, [], [], caption="seed 0")
    plot_front(tmp_path / "b.png", [], [], [])
    assert png_size(tmp_path / "a.png")[0] > 800


@pytest.mark.parametrize(("num_blocks", "num_targets"), [(1, 1), (8, 18), (40, 5)])
def test_strategies_are_drawn_for_small_and_large_models(
    tmp_path: Path, num_blocks: int, num_targets: int
) -> None:
    sites = [f"{block}.{name}" for block in range(num_blocks) for name in ("q", "k", "v")]
    targets = np.linspace(0.1, 0.9, num_targets)
    values = np.broadcast_to(targets, (len(sites), num_targets))
    path = tmp_path / "strategies.png"
    plot_strategies(path, targets.tolist(), sites, values)
    assert png_size(path)[1] <= 14 * 160


def test_a_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need 2 x 1"):
        plot_strategies(tmp_path / "x.png", [0.5], ["0.q", "0.k"], np.zeros((1, 2)))
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        plot_front(tmp_path / "nowhere" / "x.png", FRONT, [], [])
    assert list(tmp_path.iterdir()) == []


def test_drawing_replaces_the_old_picture_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "front.png"
    path.write_bytes(b"old")
    plot_front(path, FRONT, [], [])
    png_size(path)
    assert list(tmp_path.iterdir()) == [path]
