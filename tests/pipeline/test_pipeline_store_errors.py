"""What the drivers' errors mean, to those who list a source and to those who fetch an image of it."""

import pytest
from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound, TokenRetrievalError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError

from pipeline.images.verdict import judge
from pipeline.sources.reading import source_error


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
