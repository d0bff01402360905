"""The sequence of `pressroom up`, from checks to the closing words; leaves all of it running, or nothing."""

import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from devstack import binaries, control, environment, lifecycle, ports, topology
from devstack.api import Api, ApiError
from devstack.checklist import Checklist
from devstack.daemon import hold_lock
from devstack.home import Home, ensure_env, ensure_secrets, read_pairs, write_private
from devstack.samples import ingest_samples
from devstack.settings import Settings

_CHECKS, _MODELS, _SAMPLES = "checks", "models", "sample collection"
_MODELS_TIMEOUT_S = 900.0
_CHANGE_TIMEOUT_S = 240.0  # longer than any start_timeout_s: silence beyond it means a deaf supervisor


class UpFailed(Exception):
    """What failed, the lines that tell why, and the next thing to do."""

    def __init__(self, what: str, lines: list[str], next_step: str) -> None:
        super().__init__(what)
        self.what = what
        self.lines = lines
        self.next_step = next_step


def up(settings: Settings) -> list[str]:
    """Brings the system up; returns the closing words. Raises UpFailed; on it and on Ctrl-C nothing is left running."""
    home = Home(settings.home)
    home.create()
    with _only_one(home):
        if lifecycle.is_running(home):
            return _already_running(home)
        with Checklist([_CHECKS, _MODELS, *topology.NAMES, _SAMPLES]) as checklist:
            env = _prepare(settings, home, checklist)
            _prepare_models(home, checklist)
            _start(home, env, checklist)
        return ["Pressroom is ready.", "", *closing_words(env)]


def up_one(settings: Settings, service: str) -> str:
    """Starts one service again after `down SERVICE`."""
    home = Home(settings.home)
    try:
        answer = control.ask(home.run, "start", _CHANGE_TIMEOUT_S, service=service)
    except control.NotRunning:
        raise UpFailed("Pressroom is not running", [], "start all of it: make up") from None
    if not answer.get("ok"):
        raise _start_failed(home, answer, "it is tried again and again; see: ./pressroom status")
    return f"{service} is ready"


def closing_words(env: dict[str, str]) -> list[str]:
    """Returns the base URL, a key and a curl that works when pasted."""
    url, key = env["PRESSROOM_BASE_URL"], env["PRESSROOM_API_KEY"]
    question = {"role": "user", "content": "Which service keeps the access keys?"}
    body = {"model": "rag", "max_tokens": 64, "messages": [question]}
    return [
        f"  base URL  {url}",
        f"  key       {key}",
        "",
        f"curl -s {url}/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json'"
        f" -d '{json.dumps(body)}'",
    ]


@contextmanager
def _only_one(home: Home) -> Iterator[None]:
    """Two ups at once: the second is refused, for what it would wait for is the same system."""
    lock = hold_lock(home.run / "up.lock")
    if lock is None:
        raise UpFailed("another `up` is at work on this home", [], "wait for it; see: ./pressroom status")
    with lock:
        yield


def _already_running(home: Home) -> list[str]:
    env = read_pairs(home.env_file)
    status = control.ask(home.run, "status")
    head = ["Pressroom is running already."]
    if status["supervisor"]["lock_sha256"] != environment.lock_sha256():
        head.append(
            "The lock of dependencies has changed since it was started; to take the new one: make down && make up"
        )
    unready = [f"{s['name']} ({s['state']})" for s in status["services"] if s["state"] != "ready"]
    if unready:
        head.append(f"Not ready: {', '.join(unready)}. See: ./pressroom status; ./pressroom up SERVICE")
    return [*head, "", *closing_words(env)]


def _prepare(settings: Settings, home: Home, checklist: Checklist) -> dict[str, str]:
    """Chooses and checks ports, writes env and secrets. Returns the env."""
    checklist.begin(_CHECKS)
    left_over = lifecycle.sweep(home)
    try:
        binaries.verify()
        chosen = ports.plan(settings.base_port, topology.PORT_OFFSETS)
    except (binaries.BadBinary, ports.NoFreePort) as error:
        raise UpFailed(str(error), [], "./pressroom doctor") from None
    names = {port: name for name, port in chosen.items()}
    if held := ports.busy(names):
        lines = [describe_holder(holder, names[holder.port]) for holder in held]
        raise UpFailed("a port is taken", lines, "end that process, or take free ports: PRESSROOM_PORT=0 make up")
    write_private(home.ports_file, json.dumps(chosen))
    ensure_secrets(home)
    base_url = f"http://{topology.HOST}:{chosen['gateway.http']}/v1"
    env = ensure_env(home, base_url, f"{topology.HOST}:{chosen['gateway.public_grpc']}")
    if not environment.is_current():
        checklist.note(_CHECKS, "the environment is older than its lock: make setup")
    else:
        checklist.done(_CHECKS, f"ended what was left of an earlier run: {', '.join(left_over)}" if left_over else "")
    return env


def describe_holder(holder: ports.Holder, name: str) -> str:
    """Says who holds a port that we need."""
    who = f"pid {holder.pid} ({holder.what})" if holder.pid else holder.what
    return f"port {holder.port} (for {name}) is held by {who}"


def _prepare_models(home: Home, checklist: Checklist) -> None:
    checklist.begin(_MODELS)
    last: deque[str] = deque(maxlen=12)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "modelstore.prepare", "--store", str(home.models)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        with (home.logs / "models.log").open("a") as log:
            for line in process.stdout:
                log.write(line)
                if line.strip():
                    last.append(line.rstrip())
                    checklist.progress(_MODELS, line.strip())
        code = process.wait(_MODELS_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code != 0:
        checklist.failed(_MODELS, f"exit code {code}")
        raise UpFailed(f"models: preparing them ended with exit code {code}", list(last), "./pressroom doctor")
    checklist.done(_MODELS)


def _start(home: Home, env: dict[str, str], checklist: Checklist) -> None:
    """Starts the supervisor and all services, ingests the samples, and only then lets go of the connection."""
    try:
        connection = lifecycle.start_supervisor(home)
    except lifecycle.SupervisorFailed as error:
        raise UpFailed(str(error), [], f"look at {home.logs / 'supervisor.log'}") from None
    try:
        connection.send("start")
        outcome = _show_changes(connection, checklist)
        if not outcome.get("ok"):
            if outcome.get("service") in topology.NAMES:
                checklist.failed(outcome["service"], str(outcome.get("cause")))
            raise _start_failed(home, outcome, "mend that, then make up again. Nothing is left running")
        _ingest(home, env, checklist)
        connection.send("settle")
        connection.receive(_CHANGE_TIMEOUT_S)
    except control.ControlLost as error:
        raise UpFailed(f"the supervisor was lost: {error}", [], f"look at {home.logs / 'supervisor.log'}") from None
    except BaseException:
        connection.close()
        if not lifecycle.wait_gone(home):
            lifecycle.sweep(home)
        raise
    finally:
        connection.close()


def _show_changes(connection: control.Control, checklist: Checklist) -> dict[str, Any]:
    ready: set[str] = set()
    for message in connection.messages(_CHANGE_TIMEOUT_S):
        if message.get("done"):
            return message
        name, state = message["service"], message["state"]
        if state == "ready":
            ready.add(name)
            checklist.done(name)
        elif state == "starting" and name not in ready:
            checklist.begin(name)
    raise control.ControlLost("the supervisor stopped talking")


def _start_failed(home: Home, outcome: dict[str, Any], next_step: str) -> UpFailed:
    name = str(outcome.get("service", "?"))
    log = home.logs / f"{name}.log"
    return UpFailed(f"{name}: {outcome.get('cause')}", list(outcome.get("lines", [])), f"{next_step}. Log: {log}")


def _ingest(home: Home, env: dict[str, str], checklist: Checklist) -> None:
    checklist.begin(_SAMPLES)
    api = Api(env["PRESSROOM_BASE_URL"], env["PRESSROOM_API_KEY"])
    try:
        summary = ingest_samples(api, home.run.parent / "samples.json", lambda text: checklist.progress(_SAMPLES, text))
    except ApiError as error:
        checklist.failed(_SAMPLES, str(error))
        raise UpFailed(
            f"sample collection: {error}", [], "./pressroom logs retriever. Nothing is left running"
        ) from None
    checklist.done(_SAMPLES, summary)


def down(home: Home, service: str | None) -> list[str]:
    """Stops all that this home's supervisor started, or one service until it is started again; returns what to say."""
    try:
        with control.Control(home.run) as connection:
            connection.send("stop", **({"service": service} if service else {}))
            for message in connection.messages(60.0):
                if message.get("done") and not message.get("ok"):
                    raise UpFailed(f"{service}: {message.get('cause')}", [], "./pressroom status")
    except control.NotRunning:
        if service:
            return [f"{service} is not running"]
    except control.ControlLost as error:
        print(f"the supervisor does not answer ({error}); ending what it started", file=sys.stderr)
    else:
        if service:
            return [f"{service} is stopped, and stays so until: ./pressroom up {service}"]
        if lifecycle.wait_gone(home):
            return ["Pressroom is stopped."]
    left_over = lifecycle.sweep(home)
    return [f"ended what was left running: {', '.join(left_over)}"] if left_over else ["Nothing is running."]
