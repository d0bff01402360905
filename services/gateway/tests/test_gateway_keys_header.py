"""How a credential may be sent, and how not: every trick gets a 401, and nothing behind the door is asked."""

import pytest
from starlette.datastructures import Headers

from chassis.errors import Code, PlatformError
from gateway.api.middleware_access import Authentication, credential_of

KEY = "sk-one-0123456789abcdef"


def headers(*pairs):
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in pairs])


@pytest.mark.parametrize(
    "sent",
    [
        [("authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer {KEY}")],
        [("authorization", f"BEARER   {KEY} ")],
        [("x-api-key", KEY)],
        [("x-forwarded-for", "127.0.0.1"), ("x-api-key", KEY)],
    ],
)
def test_one_credential_is_read_from_either_header(sent):
    assert credential_of(headers(*sent)) == KEY


def test_a_token_may_be_longer_than_a_key_but_not_endless():
    assert credential_of(headers(("authorization", "Bearer " + "a" * 8192))) == "a" * 8192
    for name, value in (("authorization", "Bearer " + "a" * 8193), ("x-api-key", "a" * 257)):
        with pytest.raises(PlatformError):
            credential_of(headers((name, value)))


TRICKS = {
    "nothing": [],
    "empty": [("authorization", "")],
    "scheme only": [("authorization", "Bearer")],
    "scheme and space": [("authorization", "Bearer ")],
    "no scheme": [("authorization", KEY)],
    "basic": [("authorization", f"Basic {KEY}")],
    "tab for a space": [("authorization", f"Bearer\t{KEY}")],
    "unicode space": [("authorization", f"Bearer \xa0{KEY}")],
    "non-ascii": [("authorization", f"Bearer {KEY}\xe9")],
    "two bearers": [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer sk-two-0123456789abcdef")],
    "one bearer twice": [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
    "two plain": [("x-api-key", KEY), ("x-api-key", KEY)],
    "both headers": [("authorization", f"Bearer {KEY}"), ("x-api-key", KEY)],
    "empty plain": [("x-api-key", "")],
    "plain beside an empty bearer": [("authorization", ""), ("x-api-key", KEY)],
    "64 KB": [("authorization", "Bearer " + "a" * 65_536)],
    "long plain": [("x-api-key", "sk-one-" + "a" * 300)],
    "forwarded from home": [("x-forwarded-for", "127.0.0.1"), ("forwarded", "for=127.0.0.1"), ("x-real-ip", "::1")],
    "another header's name": [("api-key", KEY)],
    "cookie": [("cookie", f"authorization={KEY}")],
}


@pytest.mark.parametrize("name", TRICKS)
async def test_a_trick_with_headers_is_refused_and_nobody_is_asked(name):
    async def app(scope, receive, send):
        raise AssertionError("passed")

    class Keys:
        async def authenticate(self, key):
            raise AssertionError("asked")

    raw = headers(*TRICKS[name]).raw
    scope = {"type": "http", "path": "/v1/models", "headers": raw, "state": {}}
    with pytest.raises(PlatformError) as refused:
        await Authentication(app, keys=Keys(), open_app=app)(scope, None, None)
    assert (refused.value.code, refused.value.reason) == (Code.UNAUTHENTICATED, "invalid_api_key")
    assert KEY not in refused.value.message
