from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicuco.errors import RequestError, UnicucoError
from unicuco.types import (
    Evaluation,
    FailedEvaluation,
    ModelProfile,
    Plan,
    Prediction,
    Request,
    ServedAs,
    Site,
    Strategy,
    Target,
)


@pytest.mark.parametrize(
    ("fields", "target", "value"),
    [
        ({"sparsity": 0.6}, Target.SPARSITY, 0.6),
        ({"sparsity": 0}, Target.SPARSITY, 0.0),
        ({"max_params": 1000}, Target.MAX_PARAMS, 1000.0),
        ({"max_bytes": 4096.0, "served_as": "mask"}, Target.MAX_BYTES, 4096.0),
        ({"max_kl": 0}, Target.MAX_KL, 0.0),
        ({"preference": 1, "served_as": None}, Target.PREFERENCE, 1.0),
        ({"sparsity": None, "max_kl": 0.1}, Target.MAX_KL, 0.1),
    ],
)
def test_a_request_reads_one_target_with_its_value(
    fields: dict[str, object], target: Target, value: float
) -> None:
    request = Request.from_dict(fields)
    assert (request.target, request.value) == (target, value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0}, "sparsity must be in [0, 1), got 1"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": math.nan}, "finite"),
        ({"max_kl": math.inf}, "finite"),
        ({"max_kl": -1e-9}, "at least 0"),
        ({"preference": 1.01}, "preference must be in [0, 1]"),
        ({"max_params": 0}, "whole number above 0"),
        ({"max_params": 10.5}, "whole number above 0"),
        ({"max_bytes": -4}, "whole number above 0"),
        ({"sparsity": "0.5"}, "must be a number"),
        ({"sparsity": True}, "must be a number"),
        ({"sparsity": [0.5]}, "must be a number"),
        ({}, "exactly one target"),
        ({"sparsity": None}, "got none"),
        ({"served_as": "mask"}, "got none"),
        ({"sparsity": 0.5, "max_kl": 0.1}, "got sparsity and max_kl"),
        ({"sparcity": 0.5}, "unknown request field 'sparcity'"),
        ({"sparsity": 0.5, "seed": 1}, "unknown request field 'seed'"),
        ({"sparsity": 0.5, "served_as": "zip"}, "served_as must be one of"),
        ({"sparsity": 0.5, "served_as": ["mask"]}, "served_as must be one of"),
        ({"sparsity": 10**400}, "finite"),
        ({"max_params": 10**400}, "finite"),
        ({"task_weights": {"a": 1.0}}, "got none"),
        ({"sparsity": 0.5, "task_weights": {}}, "task_weights must be an object like"),
        ({"sparsity": 0.5, "task_weights": [0.5, 0.5]}, "task_weights must be an object like"),
        ({"sparsity": 0.5, "task_weights": {"a": True}}, "weight of a must be a number"),
        ({"sparsity": 0.5, "task_weights": {"a": "1"}}, "weight of a must be a number"),
        ({"sparsity": 0.5, "task_weights": {"a": 1.5, "b": -0.5}}, "b must be at least 0"),
        ({"sparsity": 0.5, "task_weights": {"a": math.nan}}, "a must be at least 0"),
        ({"sparsity": 0.5, "task_weights": {"a": 0.7, "b": 0.2}}, "must sum to 1, got 0.9"),
        ({"sparsity": 0.5, "task_weights": {"a": 0.5, "b": 0.500002}}, "must sum to 1"),
        ({"sparsity": 0.5, "context": 8}, "context goes with max_total_bytes, not with sparsity"),
        ({"max_bytes": 5, "batch": 8}, "goes with max_total_bytes or max_latency_ms, not with max"),
        ({"max_latency_ms": 5, "context": 8}, "context goes with max_total_bytes, not with max_l"),
        ({"max_latency_ms": 5, "batch": 0}, "batch must be a whole number above 0, got 0"),
        ({"max_latency_ms": 0}, "max_latency_ms must be above 0 ms per token, got 0"),
        ({"max_latency_ms": -1.5}, "max_latency_ms must be above 0 ms per token, got -1.5"),
        ({"max_latency_ms": math.inf}, "max_latency_ms must be a finite number"),
        ({"max_latency_ms": "fast"}, "max_latency_ms must be a number, got 'fast'"),
        ({"sparsity": 0.5, "max_latency_ms": 1}, "got sparsity and max_latency_ms"),
        ({"max_total_bytes": 5, "batch": 0}, "batch must be a whole number above 0, got 0"),
        ({"max_total_bytes": 5, "context": 1.5}, "context must be a whole number"),
        ({"max_total_bytes": 5, "context": True}, "context must be a whole number"),
        ({"max_total_bytes": 5, "context": math.inf}, "context must be a whole number"),
        ({"max_total_bytes": 5, "context": 10**400}, "context must be a whole number"),
        ({"max_total_bytes": 0.5}, "max_total_bytes must be a whole number above 0"),
        ({"max_packed_bytes": -1}, "max_packed_bytes must be a whole number above 0"),
    ],
)
def test_a_request_that_means_nothing_is_refused_in_one_line(
    fields: dict[str, object], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Request.from_dict(fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


_VALUES: dict[Target, st.SearchStrategy[float]] = {
    Target.SPARSITY: st.floats(0, 1, exclude_max=True),
    Target.MAX_PARAMS: st.integers(1, 2**53).map(float),
    Target.MAX_BYTES: st.integers(1, 2**53).map(float),
    Target.MAX_TOTAL_BYTES: st.integers(1, 2**53).map(float),
    Target.MAX_PACKED_BYTES: st.integers(1, 2**53).map(float),
    Target.MAX_KL: st.floats(0, 1e6),
    Target.MAX_LATENCY_MS: st.floats(0, 1e6, exclude_min=True),
    Target.PREFERENCE: st.floats(0, 1),
}


@given(st.data())
def test_a_request_survives_json(data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(list(Target)))
    served_as = data.draw(st.sampled_from([None, *ServedAs]))
    code = data.draw(st.floats(0, 1))
    weights = data.draw(st.sampled_from([None, (("code", code), ("prose", 1 - code))]))
    counted = st.none() | st.integers(1, 2**20)
    context = counted if target is Target.MAX_TOTAL_BYTES else st.none()
    of_batches = (Target.MAX_TOTAL_BYTES, Target.MAX_LATENCY_MS)
    batch = counted if target in of_batches else st.none()
    request = Request(
        target=target,
        value=data.draw(_VALUES[target]),
        served_as=served_as,
        task_weights=weights,
        context=data.draw(context),
        batch=data.draw(batch),
    )
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert pickle.loads(pickle.dumps(request)) == request


def test_equal_settings_have_equal_keys_and_any_other_setting_another() -> None:
    one = Strategy(settings=(("sparsity/a", 0.5), ("sparsity/b", 0.25)))
    assert one.key == Strategy(settings=(("sparsity/a", 0.5), ("sparsity/b", 0.25))).key
    others = [
        Strategy(settings=(("sparsity/b", 0.25), ("sparsity/a", 0.5))),
        Strategy(settings=(("sparsity/a", 0.5), ("sparsity/b", math.nextafter(0.25, 1)))),
        Strategy(settings=(("sparsity/a", 0.5), ("sparsity/c", 0.25))),
        Strategy(settings=(("sparsity/a", 0.5),)),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    assert len(one.key) == 64


def test_a_key_is_the_same_in_every_process_and_version() -> None:
    strategy = Strategy(settings=(("sparsity/a", 0.5), ("sparsity/b", 1 / 3)))
    assert strategy.key == "853ea7b5e02897176c286113f7d15b65b11d3db4c833b16942231dcda6322122"


def test_a_strategy_names_each_axis_once() -> None:
    with pytest.raises(ValueError, match="unique"):
        Strategy(settings=(("a", 0.5), ("a", 0.5)))


def test_a_strategy_with_a_cached_key_still_pickles_and_compares() -> None:
    strategy = Strategy(settings=(("a", 0.5),))
    fresh = Strategy(settings=(("a", 0.5),))
    assert strategy.key
    assert pickle.loads(pickle.dumps(strategy)) == fresh
    assert hash(strategy) == hash(fresh)


def _evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "strategy_key": "k" * 64,
        "kl": 0.5,
        "kept_fraction": 0.5,
        "gradient": None,
        "tokens": 8,
        "text_digest": "d",
        "cost_units": 1.0,
        "wall_s": 0.1,
    }
    return Evaluation(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes", [{"kl": math.nan}, {"kl": math.inf}, {"gradient": (0.1, math.nan)}]
)
def test_an_evaluation_is_finite(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="finite"):
        _evaluation(**changes)
    assert _evaluation(gradient=(1.0, -1.0)).gradient == (1.0, -1.0)


def test_a_failure_is_told_in_one_line() -> None:
    failure = FailedEvaluation.from_error("k", RuntimeError("no memory\n  left " + "x" * 900))
    assert failure.kind == "RuntimeError"
    assert failure.message.startswith("no memory left x")
    assert len(failure.message) == 500


def test_a_prediction_lies_inside_its_interval_above_zero() -> None:
    Prediction(mean=0.1, lo95=0.1, hi95=0.1)
    for mean, low, high in [(0.1, -0.1, 0.2), (0.1, 0.15, 0.2), (0.3, 0.1, 0.2)]:
        with pytest.raises(ValueError, match="lo95"):
            Prediction(mean=mean, lo95=low, hi95=high)


def test_site_paths_of_a_profile_are_unique() -> None:
    site = Site(block=0, path="a", num_rows=2, num_columns=3)
    fields: dict[str, Any] = {
        "digest": "d",
        "architecture": "A",
        "block_paths": ("b",),
        "block_params": (12,),
        "block_bytes": (24,),
        "total_params": 20,
        "total_bytes": 40,
        "vocabulary_size": 5,
        "max_context": 8,
    }
    with pytest.raises(ValueError, match="unique"):
        ModelProfile(sites=(site, site), **fields)
    profile = ModelProfile(sites=(site,), **fields)
    assert (profile.num_blocks, profile.num_site_weights) == (1, 6)


def test_a_plan_is_the_document_of_the_command_line() -> None:
    plan = Plan(
        request=Request(target=Target.MAX_PARAMS, value=12),
        strategy=Strategy(settings=(("sparsity/a", 0.5),)),
        sparsity=0.5,
        kept_params=12,
        total_params=20,
        num_bytes=80,
        served_as=ServedAs.MASK,
        kl=Prediction(mean=0.2, lo95=0.1, hi95=0.4),
    )
    assert json.loads(json.dumps(plan.to_dict())) == {
        "request": {"max_params": 12},
        "strategy": {"settings": {"sparsity/a": 0.5}},
        "sparsity": 0.5,
        "kept_params": 12,
        "total_params": 20,
        "bytes": 80,
        "served_as": "mask",
        "predicted": {"kl": {"mean": 0.2, "lo95": 0.1, "hi95": 0.4}},
    }


def test_every_error_is_one_of_ours() -> None:
    from unicuco import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    own = [kind for kind in kinds if issubclass(kind, Exception)]
    assert all(issubclass(kind, UnicucoError) for kind in own)
    assert {kind.__name__: kind.exit_code for kind in own if kind.exit_code != 1} == {
        "RequestError": 2,
        "InfeasibleRequestError": 3,
    }
