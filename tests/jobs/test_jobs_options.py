"""What options are called on the command line and in the spec."""

import inspect

import pytest

from jobs import embed, options
from schemas.spec import FetchSpec, JobSpec, TritonSpec
from schemas.values import Strict


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        (JobSpec, {key: key for key in (*embed._SPEC_KEYS, *options.SAMPLED)}),
        (FetchSpec, options._FETCH_KEYS),
        (TritonSpec, options._TRITON_KEYS),
    ],
)
def test_what_is_taken_from_options_has_its_place_in_the_spec(spec: type[Strict], keys: dict[str, str]) -> None:
    assert set(keys) <= set(spec.model_fields)
    assert set(keys.values()) <= set(inspect.signature(embed.job).parameters)
