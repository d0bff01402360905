"""Names that more than one service needs: HTTP headers and defaults."""

HEADER_REQUEST_ID = "x-request-id"
HEADER_TRACE_ID = "x-trace-id"

DEFAULT_COLLECTION = "default"
DEFAULT_TENANT = "default"
