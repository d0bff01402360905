"""What the gateway's routes need of its state: keys, rate limits and the ledger, as small protocols.

Knows nothing of SQLite, Valkey or HTTP. The concrete classes live in backends/ and are joined in main.py.
"""

from dataclasses import dataclass, field
from typing import Protocol

from gateway.core.policy import UNRESTRICTED, Policy


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request: one access key and the tenant that it belongs to."""

    key_id: str
    tenant: str
    is_admin: bool = False
    requests_per_minute: int | None = None  # None: no limit
    allows_text: bool = False  # the tenant lets its prompts and completions be profiled
    policy: Policy = UNRESTRICTED  # the key's own
    tenant_policy: Policy = UNRESTRICTED

    def may_ask(self, model: str) -> bool:
        """Says whether key and tenant both allow a model."""
        return self.policy.allows_model(model) and self.tenant_policy.allows_model(model)

    def has_scope(self, scope: str) -> bool:
        """Says whether key and tenant both allow a group of routes."""
        return self.policy.allows_scope(scope) and self.tenant_policy.allows_scope(scope)


@dataclass(frozen=True, slots=True)
class LimitState:
    """The state of one key's request limit after a hit; limit None means that there is none."""

    allowed: bool
    limit: int | None
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What is accounted and published when a request has ended, whatever way it ended."""

    request_id: str
    trace_id: str
    traceparent: str
    tenant: str
    key_id: str
    model: str
    route: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str  # "stop", "length", "cancelled", "error" or "deadline"
    http_status: int
    stream: bool
    started_unix_ms: int
    duration_s: float
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    grounded: bool | None = None
    error_code: str = ""
    repeat: str = ""  # "hit", "shared" or "replayed": nothing was used, see core.account.Repeat
    repeated_prompt_tokens: int = 0  # what a hit or a shared run would have used
    repeated_completion_tokens: int = 0
    prompt_text: str = field(default="", repr=False)
    completion_text: str = field(default="", repr=False)
    usage_id: str = ""  # the account's; one that was written already is not written again
    is_exact: bool = True  # False: the generator could not be asked, and this is what was received


class Keys(Protocol):
    """Checks access keys."""

    async def authenticate(self, key: str) -> Principal:
        """Returns who owns the key; raises UNAUTHENTICATED alike for malformed, unknown, wrong and revoked."""
        ...


class RequestLimiter(Protocol):
    """Counts requests against limits."""

    async def hit(self, principal: Principal) -> LimitState:
        """Counts one request; never raises and never takes longer than its own time-out when its store is away."""
        ...


class Ledger(Protocol):
    """Writes what was used."""

    async def record(self, record: RequestRecord) -> None:
        """Writes what was used, once for each usage id, and strikes off the start record; durable when it returns."""
        ...
