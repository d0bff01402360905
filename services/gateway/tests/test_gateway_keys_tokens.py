"""Signed tokens in place of keys: which are taken, which are not, and where the issuer's keys come from."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from chassis.errors import Code, PlatformError
from gateway.backends.oidc import OidcVerifier, PublicKeySet, Trust, public_keys, reads_file, reads_url
from gateway.backends.sqlite import Database
from gateway.backends.sqlite_keys import SqliteKeys
from gateway.backends.sqlite_schema import MIGRATIONS
from gateway.core.administration import Administration, NewKey
from gateway.core.keys import KeyRing, TenantRow
from gateway.core.policy import Policy
from gateway.core.tokens import Credentials, Identity, Tokens
from testkit import eventually, free_port
from testkit.clock import FakeClock

ISSUER, AUDIENCE = "https://id.example.com/", "pressroom"
TRUST = Trust(ISSUER, AUDIENCE, "tenant")
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
SHORT_RSA_KEY = rsa.generate_private_key(65537, 1024)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
PEM = RSA_KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


pytestmark = pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")


def jwk(key, kid, **more):
    algorithm = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    name = next((name for kind, name in algorithm.items() if isinstance(key, kind)), "EdDSA")
    return json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key())) | {"kid": kid, **more}


SET = {
    "keys": [
        jwk(RSA_KEY, "rsa", use="sig", alg="RS256"),
        jwk(EC_KEY, "ec"),
        jwk(ED_KEY, "ed"),
        jwk(OTHER_RSA_KEY, "for-encryption", use="enc"),
        jwk(SHORT_RSA_KEY, "short"),
        {"kty": "oct", "kid": "shared", "k": "c2hhcmVkLXNlY3JldC1vZi0zMi1ieXRlcy1vci1tb3Jl"},
        {"kty": "odd", "kid": "odd"},
        {"kty": "RSA", "kid": 7},
        "no key",
    ]
}


def claims(**changes):
    now = int(time.time())
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "tenant": "acme", "exp": now + 300, "iat": now} | changes
    return {name: value for name, value in said.items() if value is not None}


def token(key=RSA_KEY, algorithm="RS256", kid="rsa", headers=None, **changes):
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": kid} | (headers or {}))


def b64(data):
    return base64.urlsafe_b64encode(data if isinstance(data, bytes) else json.dumps(data).encode()).rstrip(b"=")


def hand_made(header, payload, signature=b"x"):
    return b".".join([b64(header), b64(payload), b64(signature)]).decode()


def public_key_as_secret():
    """The old trick: the algorithm is told to be symmetric, with the public key for a secret."""
    signed = b64({"alg": "HS256", "typ": "JWT", "kid": "rsa"}) + b"." + b64(claims())
    return (signed + b"." + b64(hmac.digest(PEM, signed, hashlib.sha256))).decode()


def signed(payload):
    """A payload that no library would write, with a right signature."""
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return jwt.api_jws.encode(raw, RSA_KEY, "RS256", headers={"kid": "rsa"})


async def loaded(trust=TRUST, document=SET):
    async def read():
        return json.dumps(document).encode()

    keys = PublicKeySet(read)
    assert await keys.refresh()
    return OidcVerifier(trust, keys)


@pytest.fixture
async def world(tmp_path):
    """The ring and the administration over a database with the tenant acme, and what takes tokens and keys."""
    database = await Database.open(tmp_path / "gateway.db", MIGRATIONS)
    book, clock, verifier = SqliteKeys(database), FakeClock(), await loaded()
    ring = KeyRing(book, b"pepper", clock=clock)
    office = Administration(book, b"pepper", ring, Silent())
    await office.put_tenant("test", TenantRow("acme", allows_text=True, policy=Policy(priority=2)))
    yield World(book, clock, ring, office, verifier, Credentials(ring, Tokens(verifier, ring)))
    await database.close()


@dataclass
class World:
    book: SqliteKeys
    clock: FakeClock
    ring: KeyRing
    office: Administration
    verifier: OidcVerifier
    credentials: Credentials


class Silent:
    async def access_changed(self, *, key_ids, tenants):
        pass


async def refused(credentials, text):
    with pytest.raises(PlatformError) as error:
        await credentials.authenticate(text)
    return error.value.code, error.value.message, error.value.reason, error.value.param


async def test_a_good_token_names_its_sender(world):
    now = int(time.time())
    for good in (
        token(),
        token(EC_KEY, "ES256", "ec"),
        token(ED_KEY, "EdDSA", "ed"),
        token(aud=["others", AUDIENCE]),
        token(exp=now - 5),  # the clocks may differ by a little
        token(nbf=now + 5),
        token(headers={"typ": "at+jwt"}),
    ):
        principal = await world.credentials.authenticate(good)
        assert (principal.tenant, principal.allows_text, principal.tenant_policy.priority) == ("acme", True, 2)
        assert not principal.is_admin and principal.requests_per_minute is None
        assert principal.key_id == Identity(ISSUER, "ann", "acme", 0).key_id  # the same for all of ann's tokens


async def test_keys_are_taken_beside_tokens(world):
    key_id, key = await world.office.create_key("test", NewKey("acme"))
    assert (await world.credentials.authenticate(key)).key_id == key_id


def bad_tokens():
    good = token()
    header, payload, signature = good.split(".")
    deep = b"[" * 3000 + b"]" * 3000
    unsigned = {"alg": "none", "typ": "JWT", "kid": "rsa"}
    return {
        "empty": "",
        "no token": "hello",
        "two parts": f"{header}.{payload}",
        "four parts": f"{good}.x",
        "dots": "..",
        "no signature": f"{header}.{payload}.",
        "another's signature": f"{header}.{payload}.{token(sub='bob').split('.')[2]}",
        "another payload": f"{header}.{b64(claims(tenant='other')).decode()}.{signature}",
        "alg none": hand_made(unsigned, claims(), b""),
        "alg None": hand_made(unsigned | {"alg": "None"}, claims(), b""),
        "alg absent": hand_made({"kid": "rsa"}, claims()),
        "alg a list": hand_made({"alg": ["RS256"], "kid": "rsa"}, claims()),
        "public key as secret": public_key_as_secret(),
        "symmetric key of the set": token("shared-secret-of-32-bytes-or-more", "HS256", "shared"),
        "another algorithm of the same key": token(RSA_KEY, "PS256"),
        "another key under this id": token(OTHER_RSA_KEY),
        "key of another kind": token(EC_KEY, "ES256", "rsa"),
        "key for encryption": token(OTHER_RSA_KEY, kid="for-encryption"),
        "short key": token(SHORT_RSA_KEY, kid="short"),
        "unknown kid": token(kid="nobody"),
        "kid of a path": token(kid="../../etc/passwd"),
        "kid of sql": token(kid="' OR 1=1 --"),
        "kid a number": hand_made({"alg": "RS256", "kid": 7}, claims()),
        "kid a list": hand_made({"alg": "RS256", "kid": []}, claims()),
        "no kid": jwt.encode(claims(), RSA_KEY, "RS256"),
        "own key in the header": jwt.encode(
            claims(), OTHER_RSA_KEY, "RS256", headers={"kid": "mine", "jwk": jwk(OTHER_RSA_KEY, "mine")}
        ),
        "own url in the header": token(OTHER_RSA_KEY, headers={"jku": "http://127.0.0.1:1/keys"}),
        "unknown critical header": token(headers={"crit": ["x"], "x": 1}),
        "detached payload": token(headers={"crit": ["b64"], "b64": False}),
        "expired": token(exp=int(time.time()) - 60),
        "not yet": token(nbf=int(time.time()) + 60),
        "from the future": token(iat=int(time.time()) + 60),
        "no exp": token(exp=None),
        "exp a word": token(exp="tomorrow"),
        "exp infinite": signed(json.dumps(claims(exp=0)).replace('"exp": 0', '"exp": 1e999').encode()),
        "no iss": token(iss=None),
        "another issuer": token(iss="https://id.example.com"),
        "issuers in a list": signed(claims(iss=[ISSUER])),
        "no aud": token(aud=None),
        "another audience": token(aud="grafana"),
        "no sub": token(sub=None),
        "empty sub": token(sub=""),
        "no tenant": token(tenant=None),
        "tenant a list": token(tenant=["acme"]),
        "tenant a path": token(tenant="../acme"),
        "tenant in capitals": token(tenant="ACME"),
        "tenant that is not there": token(tenant="nobody"),
        "payload no object": signed([1]),
        "payload no json": signed(b"{"),
        "deep header": hand_made(deep, claims()),
        "deep payload": signed(deep),
        "header no utf-8": hand_made(b"\xff\xfe", claims()),
        "header no object": hand_made([1], claims()),
        "no base64": "!!!.!!!.!!!",
        "huge": token(pad="x" * 100_000, sub=None),
    }


async def test_every_bad_token_gets_the_answer_that_bad_keys_get(world):
    answers = {name: await refused(world.credentials, bad) for name, bad in bad_tokens().items()}
    key = await refused(world.credentials, "sk-nobody-" + "x" * 43)
    assert key[0] is Code.UNAUTHENTICATED
    assert {name: answer for name, answer in answers.items() if answer != key} == {}


async def test_a_token_is_narrowed_by_what_its_claims_say(world):
    trust = Trust(ISSUER, AUDIENCE, "tenant", scopes_claim="scope", models_claim="https://example.com/models")
    tokens = Tokens(await loaded(trust), world.ring)
    said = token(**{"scope": "openid inference", "https://example.com/models": ["smollm2-135m-instruct:*"]})
    principal = await tokens.authenticate(said)
    assert principal.has_scope("inference") and not principal.has_scope("files")
    assert principal.may_ask("smollm2-135m-instruct:mine") and not principal.may_ask("rag")
    for missing in ({"scope": "inference"}, {"https://example.com/models": []}, {"scope": 7, "models": []}):
        await refused(tokens, token(**missing))  # a claim that is named must be there


async def test_a_disabled_tenant_ends_its_tokens_within_a_second(world):
    good = token()
    await world.credentials.authenticate(good)
    elsewhere = Administration(world.book, b"pepper", KeyRing(world.book, b"pepper"), Silent())
    await elsewhere.put_tenant("test", TenantRow("acme", disabled_unix_s=1))
    await world.credentials.authenticate(good)
    world.clock.advance(1.0)
    await refused(world.credentials, good)


class CountingVerifier:
    def __init__(self, verifier):
        self.epoch, self.num_calls, self._verifier = 1, 0, verifier

    def verify(self, text):
        self.num_calls += 1
        return self._verifier.verify(text)


async def test_a_good_token_is_remembered_for_a_moment_and_a_bad_one_is_not(world):
    now = FakeClock(time.time())
    counting = CountingVerifier(world.verifier)
    tokens = Tokens(counting, world.ring, now=now, max_cached=10)
    good, bad = token(exp=int(now()) + 30), token(kid="nobody")
    for _ in range(5):
        await tokens.authenticate(good)
        await refused(tokens, bad)
    assert counting.num_calls == 1 + 5
    counting.epoch += 1  # the issuer has new keys
    await tokens.authenticate(good)
    now.advance(30)  # it expires before the moment is over
    await tokens.authenticate(good)
    assert counting.num_calls == 1 + 5 + 2
    for i in range(30):
        await tokens.authenticate(token(sub=f"s{i}"))
    assert len(tokens._good) == 10


def test_a_set_without_usable_keys_is_refused():
    for document in ({}, [], {"keys": {}}, {"keys": []}, {"keys": SET["keys"][3:]}):
        with pytest.raises(ValueError, match="no public key"):
            public_keys(json.dumps(document).encode())
    private = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA_KEY)) | {"kid": "oops"}
    with pytest.raises(ValueError, match="no public key"):
        public_keys(json.dumps({"keys": [private]}).encode())
    assert set(public_keys(json.dumps(SET).encode())) == {"rsa", "ec", "ed"}


class Issuer:
    """Serves a key set, or fails to."""

    def __init__(self):
        self.document, self.status, self.delay_s, self.num_calls = SET, 200, 0.0, 0

    async def answer(self, _):
        self.num_calls += 1
        await asyncio.sleep(self.delay_s)
        if self.status == 302:
            raise web.HTTPFound("/elsewhere")
        return web.Response(text=json.dumps(self.document), status=self.status)

    async def moved(self, _):
        return web.json_response(SET)


@pytest.fixture
async def issuer():
    made, app, port = Issuer(), web.Application(), free_port()
    app.router.add_get("/keys", made.answer)
    app.router.add_get("/elsewhere", made.moved)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    made.url = f"http://127.0.0.1:{port}/keys"
    yield made
    await runner.cleanup()


async def test_keys_come_from_a_url_and_are_kept_while_it_fails(issuer):
    clock = FakeClock()
    keys = PublicKeySet(reads_url(issuer.url), clock=clock)
    verifier = OidcVerifier(TRUST, keys)
    with pytest.raises(PlatformError) as error:
        verifier.verify(token())
    assert (error.value.code, error.value.reason) == (Code.UNAVAILABLE, "oidc_keys_unavailable")
    assert await keys.refresh()
    verifier.verify(token())
    for failure in (500, 302):
        issuer.status = failure
        assert not await keys.refresh()
    issuer.status, issuer.document = 200, {"keys": [], "pad": "x" * 300_000}
    assert not await keys.refresh()
    clock.advance(86_400)
    verifier.verify(token())
    clock.advance(1)  # older than that they may have been withdrawn long ago
    with pytest.raises(PlatformError):
        verifier.verify(token())


async def test_a_frozen_issuer_holds_up_nobody(issuer, monkeypatch):
    monkeypatch.setattr("gateway.backends.oidc._FETCH_TIMEOUT_S", 0.2)
    keys = PublicKeySet(reads_url(issuer.url))
    assert await keys.refresh()
    issuer.delay_s = 3.0
    refreshing = asyncio.create_task(keys.refresh())
    await asyncio.sleep(0)
    OidcVerifier(TRUST, keys).verify(token())  # no word of waiting
    assert not await refreshing


async def test_a_new_key_is_found_when_a_token_names_it_and_at_a_bounded_rate(issuer, monkeypatch):
    monkeypatch.setattr("gateway.backends.oidc._MIN_GAP_S", 0.3)
    keys = PublicKeySet(reads_url(issuer.url))
    verifier = OidcVerifier(TRUST, keys)
    running = asyncio.create_task(verifier.run())
    await eventually(lambda: keys.epoch == 1)
    issuer.document = {"keys": [jwk(OTHER_RSA_KEY, "new")]}
    began, fresh = time.monotonic(), token(OTHER_RSA_KEY, kid="new")

    def is_taken():
        try:
            return verifier.verify(fresh).subject == "ann"
        except PlatformError:
            return False

    await eventually(is_taken)
    with pytest.raises(PlatformError):
        verifier.verify(token())  # the old key is gone
    took_s = time.monotonic() - began
    assert issuer.num_calls <= 2 + took_s / 0.3
    running.cancel()


async def test_keys_come_from_a_file_that_changes(tmp_path):
    path = tmp_path / "jwks.json"
    keys = PublicKeySet(reads_file(path))
    assert not await keys.refresh()
    path.write_text(json.dumps(SET))
    assert await keys.refresh() and set(keys.current()) == {"rsa", "ec", "ed"}
    path.write_text("{")
    assert not await keys.refresh() and set(keys.current()) == {"rsa", "ec", "ed"}
    path.write_bytes(b" " * 300_000)
    assert not await keys.refresh()
