"""The 64 requests of the demo: every kind, mixed."""

from __future__ import annotations

from unicuco.types import Request, Target

NUM_REQUESTS = 64


def demo_requests(*, total_params: int, site_params: int, num_bytes: int) -> list[Request]:
    """Return 64 different requests that a run with masks can meet, kinds mixed.

    Args:
        total_params: parameters of the dense model.
        site_params: those of them that can be dropped.
        num_bytes: tensor bytes of the dense model; a masked variant is stored at just that size, so
            a byte target can't ask for less.
    """
    kinds = [
        [_request(Target.SPARSITY, 0.12 + 0.03 * k) for k in range(24)],
        [
            _request(Target.MAX_PARAMS, total_params - site_params * (5 + 5 * k) // 100)
            for k in range(16)
        ],
        [_request(Target.MAX_KL, 0.01 * 1.4**k) for k in range(12)],
        [_request(Target.PREFERENCE, 0.05 + 0.1 * k) for k in range(8)],
        [_request(Target.MAX_BYTES, num_bytes + k * 2**20) for k in range(4)],
    ]
    mixed = []
    while any(kinds):
        mixed += [kind.pop(0) for kind in kinds if kind]
    return mixed


def _request(target: Target, value: float) -> Request:
    return Request(target=target, value=round(value, 6))
