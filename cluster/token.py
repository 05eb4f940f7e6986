"""The token of a cluster: whether it wants one, whether it takes ours, and what to say if not.

Ray's own answer to a wrong token is "Failed to connect", after 20 s of tries. One call of the service that every Ray
client calls first tells at once: a head answers it with UNAUTHENTICATED unless it carries the right token.
"""

import grpc
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from schemas.errors import ClusterError

_FIRST_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"


def check_token(address: str, timeout_s: float) -> None:
    """Raises ClusterError if `address` (HOST:PORT of a head) turns our token down, or asks for one where we have none.

    Says nothing about anything else: whoever does not answer, or is no Ray head, is found out by attaching.
    """
    try:
        headers = get_auth_headers_if_auth_enabled({})
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(no_token(address)) from error
    with grpc.insecure_channel(address) as channel:
        try:
            metadata = [(name.lower(), value) for name, value in headers.items()]
            channel.unary_unary(_FIRST_CALL)(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(no_token(address)) from error


def no_token(address: str) -> str:
    """What to say when the cluster turns us down."""
    return (
        f"{address} wants a token that this machine does not have: set RAY_AUTH_MODE=token and put the cluster's "
        "token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )
