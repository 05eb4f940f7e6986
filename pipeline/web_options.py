"""Storage options for the web, as its driver and aiohttp behind it take them."""

import base64
from collections.abc import Mapping
from typing import Any

# Of options that may as well be a bucket's.
_DRIVER = frozenset(
    {"headers", "auth", "cookies", "params", "timeout", "allow_redirects", "max_redirects", "proxy", "proxy_auth"}
    | {"proxy_headers", "ssl", "server_hostname", "client_kwargs", "get_client", "encoded", "simple_links"}
    | {"same_scheme", "block_size", "cache_type", "cache_options", "use_listings_cache", "skip_instance_cache"}
)
_CLIENT = frozenset(
    {"headers", "auth", "cookies", "cookie_jar", "timeout", "connector", "proxy", "proxy_auth", "trust_env"}
    | {"requote_redirect_url", "read_bufsize", "max_line_size", "max_field_size"}
)


def web_options(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of options for every scheme those of the web, so that no bucket's key is given to a web server."""
    options = {name: value for name, value in flat.items() if name in _DRIVER}
    if isinstance(client := options.pop("client_kwargs", None), dict):
        options["client_kwargs"] = {name: value for name, value in client.items() if name in _CLIENT}
    return with_basic_auth(options)


def with_basic_auth(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with `auth`, user and password in a list, as the header that it stands for (RFC 7617).

    JSON has no other form for it, and aiohttp takes none but a class of its own, which it is about to give up.
    """
    changed = {name: with_basic_auth(value) if name == "client_kwargs" else value for name, value in options.items()}
    auth = changed.get("auth")
    if not (isinstance(auth, list | tuple) and len(auth) == 2 and all(isinstance(part, str) for part in auth)):
        return changed
    del changed["auth"]
    text = base64.b64encode(":".join(auth).encode()).decode()
    return {**changed, "headers": {"Authorization": f"Basic {text}", **changed.get("headers", {})}}
