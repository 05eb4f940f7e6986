"""What the drivers' errors mean, to those who list a source and to those who fetch an image of it."""

import pytest
from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound, TokenRetrievalError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError
from google.auth.exceptions import TimeoutError as TokenTimeoutError

from pipeline.images.verdict import judge
from pipeline.sources.reading import source_error
from pipeline.store_errors import manifest_error, read_error


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError(),
        PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        TokenRetrievalError(provider="sso", error_msg="over"),
        ProfileNotFound(profile="nobody"),
        GoogleAuthError("none"),
        DefaultCredentialsError("none"),
        RefreshError("over"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_credentials_that_are_not_there_are_told_as_such(error: Exception) -> None:
    assert str(source_error("s3://bucket/a", error)).startswith("s3://bucket/a: no credentials were found")
    verdict = judge(error)
    assert (verdict.error, verdict.again, verdict.retryable) == ("NoCredentials", False, True)


@pytest.mark.parametrize(
    ("error", "name"), [(TransportError("no route"), "ConnectionFailed"), (TokenTimeoutError("late"), "TimedOut")]
)
def test_a_server_of_tokens_that_does_not_answer_is_no_lack_of_credentials(error: Exception, name: str) -> None:
    assert str(source_error("gs://bucket/a", error)).startswith("gs://bucket/a: cannot be read (")
    verdict = judge(error)
    assert (verdict.error, verdict.again, verdict.retryable) == (name, True, True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TimeoutError(), "TimeoutError"),
        (
            ValueError("no\nanswer from  https://me:secret@host/a?sig=x"),
            "ValueError: no answer from https://host/a?sig=…",
        ),
    ],
)
def test_an_error_is_told_on_one_line_whether_or_not_it_says_anything(error: Exception, told: str) -> None:
    assert str(read_error("s3://bucket/a", error)).startswith(f"cannot read s3://bucket/a: {told}. Check the address")
    assert f"of the run's manifest ({told}). What was committed" in str(manifest_error("s3://bucket/a", error))
    assert str(source_error("s3://bucket/a", error)) == f"s3://bucket/a: cannot be read ({told})"
