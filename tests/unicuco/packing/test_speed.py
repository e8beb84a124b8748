from __future__ import annotations

import math

import pytest

from unicuco.errors import RequestError
from unicuco.packing import Link


def test_without_a_speed_only_size_counts() -> None:
    assert Link().pays(1000, 900, decode_s=1e9)
    assert not Link().pays(1000, 1000, decode_s=0)
    assert not Link().pays(1000, 999, decode_s=0)


def test_it_pays_exactly_where_the_link_takes_longer_for_what_is_saved() -> None:
    # 1 MB saved at 8 Mbit/s is one second.
    link = Link(mbps=8.0)
    assert link.pays(2_000_000, 1_000_000, decode_s=0.99)
    assert not link.pays(2_000_000, 1_000_000, decode_s=1.01)


def test_a_slower_link_or_more_threads_never_make_it_pay_less() -> None:
    paid = [Link(mbps=mbps).pays(4000, 1000, decode_s=1e-4) for mbps in (1e5, 1e3, 10, 1)]
    assert paid == sorted(paid)
    assert set(paid) == {False, True}
    assert not Link(mbps=300.0).pays(4000, 1000, decode_s=1e-4)
    assert Link(mbps=300.0, threads=4).pays(4000, 1000, decode_s=2e-4)


@pytest.mark.parametrize("mbps", [0.0, -1.0, math.nan, math.inf])
def test_a_link_without_a_speed_is_refused(mbps: float) -> None:
    with pytest.raises(RequestError, match="above 0 Mbit/s"):
        Link(mbps=mbps)
