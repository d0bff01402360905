"""Which scope a route needs: the table by which keys are held to groups of routes.

A key without scopes may use every route. One with scopes may use those of its scopes, and nothing that the table does
not know: a route that somebody forgot to put here is closed to it and not open.
"""

from chassis.errors import Code, PlatformError
from gateway.core.ports import Principal

INFERENCE = "inference"
EMBEDDINGS = "embeddings"
SEARCH = "search"
DOCUMENTS = "documents"
FILES = "files"
JOBS = "jobs"
BATCHES = "batches"
FINE_TUNING = "fine_tuning"
EVALUATIONS = "evaluations"
MODELS_READ = "models.read"
MONITOR = "monitor"
USAGE = "usage"
ADMIN = "admin"  # opens nothing by itself: the key must be an admin's too

# A path belongs to the first entry that it equals or lies below.
_SCOPE_OF: tuple[tuple[str, str], ...] = (
    ("/v1/chat", INFERENCE),
    ("/v1/completions", INFERENCE),
    ("/v1/messages", INFERENCE),
    ("/v1/responses", INFERENCE),
    ("/generate", INFERENCE),
    ("/v2", INFERENCE),
    ("/v1/embeddings", EMBEDDINGS),
    ("/v1/rerank", EMBEDDINGS),
    ("/rerank", EMBEDDINGS),
    ("/v1/search", SEARCH),
    ("/v1/documents", DOCUMENTS),
    ("/v1/files", FILES),
    ("/v1/jobs", JOBS),
    ("/v1/batches", BATCHES),
    ("/v1/fine_tuning", FINE_TUNING),
    ("/v1/evaluations", EVALUATIONS),
    ("/v1/models", MODELS_READ),
    ("/v1/monitor", MONITOR),
    ("/v1/usage", USAGE),
    ("/admin", ADMIN),
)
SCOPES = tuple(dict.fromkeys(scope for _, scope in _SCOPE_OF))


def scope_of(path: str) -> str | None:
    """Returns the scope that a path needs; None for one that the table does not know."""
    for prefix, scope in _SCOPE_OF:
        if path == prefix or path.startswith(prefix + "/"):
            return scope
    return None


def require_scope(principal: Principal, path: str) -> None:
    """Raises PERMISSION_DENIED unless key and tenant both have the scope of the path."""
    if principal.policy.scopes is None and principal.tenant_policy.scopes is None:
        return
    scope = scope_of(path)
    if scope is None or not principal.has_scope(scope):
        what = f"the scope {scope!r}" if scope else "a key without scopes"
        raise PlatformError(Code.PERMISSION_DENIED, f"this route needs {what}", reason="scope_missing")
