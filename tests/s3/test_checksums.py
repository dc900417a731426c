"""Whether checksums are sent and asked for, as the environment and the profile say."""

from __future__ import annotations

import pytest

from shim.http.errors import SettingInvalid
from shim.s3.checksums import ChecksumPolicy, checksum_policy

REQUEST, RESPONSE = "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"


@pytest.mark.parametrize(
    ("environ", "profile", "expected"),
    [
        pytest.param({}, {}, (True, True), id="nothing is said"),
        pytest.param({REQUEST: "", RESPONSE: ""}, {}, (True, True), id="empty"),
        pytest.param({REQUEST: "when_required"}, {}, (False, True), id="requests"),
        pytest.param({RESPONSE: "WHEN_REQUIRED"}, {}, (True, False), id="answers, in capitals"),
        pytest.param(
            {},
            {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            (False, False),
            id="the profile",
        ),
        pytest.param(
            {REQUEST: "when_supported"},
            {"request_checksum_calculation": "when_required"},
            (True, True),
            id="the environment before the profile",
        ),
    ],
)
def test_the_policy_is_read_as_botocore_reads_it(
    environ: dict[str, str], profile: dict[str, str], expected: tuple[bool, bool]
) -> None:
    request_checksum, response_checksum = expected
    assert checksum_policy(environ, profile) == ChecksumPolicy(
        request_checksum=request_checksum, response_checksum=response_checksum
    )


@pytest.mark.parametrize(
    ("environ", "profile", "name"),
    [
        pytest.param({REQUEST: "s3cret"}, {}, REQUEST, id="variable"),
        pytest.param(
            {},
            {"response_checksum_validation": "s3cret"},
            "response_checksum_validation of the profile",
            id="option",
        ),
    ],
)
def test_another_word_is_refused_and_not_shown(
    environ: dict[str, str], profile: dict[str, str], name: str
) -> None:
    with pytest.raises(SettingInvalid) as caught:
        checksum_policy(environ, profile)
    assert str(caught.value) == (
        f"{name}: expected when_supported or when_required, found a text of 6 characters"
    )
