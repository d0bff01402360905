"""An attack through the running system: it is refused, and no log, span or counter tells a key or forges a line."""

import json

from testkit import eventually_sync

CHAT = "smollm2-135m-instruct"
FORGED = '\n{"level": "ERROR", "message": "forged"}\x1b[2J'


def test_attack_is_refused_and_nothing_is_told(system):
    secrets = [system.env[name].split("-", 2)[2] for name in ("PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY")]
    key = system.env["PRESSROOM_API_KEY"]
    plain = {"model": CHAT, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answers = []
    with system.http() as client:
        answers.append(client.post("/chat/completions", json=plain | {"model": FORGED}))
        answers.append(client.post("/chat/completions", json=plain | {"chat_template": "{{ 7 * 7 }}"}))
        answers.append(client.get("/models", headers={"x-api-key": key}))
        answers.append(client.get(f"/files/{key}"))
        answers.append(client.post("/chat/completions", json=plain | {"stop": [str(n) for n in range(10_000)]}))
    with system.http("none") as client:
        for headers in ({"authorization": key}, {"authorization": f"Bearer {key}x"}, {"x-api-key": key[:-1]}):
            answers.append(client.get("/models", headers=headers))
        answers.append(client.get("/models", params={"api_key": key}))
    assert [one.status_code for one in answers] == [404, 400, 401, 404, 400, 401, 401, 401, 401]
    for answer in answers:
        assert answer.json()["error"]["message"] and answer.headers["x-request-id"] and answer.headers["x-trace-id"]

    lines = [line for path in (system.home / "logs").glob("gateway.log") for line in path.read_text().splitlines()]
    assert lines and not [line for line in lines if json.loads(line)["message"] == "forged"]
    told = [path for folder in ("logs", "traces") for path in (system.home / folder).glob("*") if path.is_file()]
    texts = {path.name: path.read_text(errors="replace") for path in told}
    texts |= {f"metrics of {name}": system.metrics(name) for name in ("gateway", "generator")}
    assert [(name, secret) for name, text in texts.items() for secret in secrets if secret in text] == []

    def is_idle() -> bool:
        running = [one for one in system.metrics("generator").splitlines() if one.startswith("pressroom_running_seq")]
        return bool(running) and all(one.endswith(" 0.0") for one in running)

    eventually_sync(is_idle, 30, interval_s=0.3)
