"""A moto server that speaks S3, in its own process. Run by `s3`."""

import logging
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from support.child import announce, end_with_parent
from support.ports import LOOPBACK
from werkzeug.serving import make_server


class Store:
    """The WSGI application, with conditional puts one at a time: moto looks and writes in two steps."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._conditional = threading.Lock()

    def __call__(self, environ, start_response):  # type: ignore[no-untyped-def]
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ:
            with self._conditional:
                return self._application(environ, start_response)
        return self._application(environ, start_response)


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server(LOOPBACK, 0, Store(), threaded=True, request_handler=MotoRequestHandler)
    end_with_parent()
    announce(f"http://{LOOPBACK}:{server.server_port}")
    server.serve_forever()
