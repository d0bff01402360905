"""Profiles of what was asked and answered, through the whole system."""

import json
import re

from testkit import eventually_sync

CHAT = "smollm2-135m-instruct"
NUM_CHATS = 3
# No other test sends one, so its number is exact.
PATTERN = "prompt.email address_count"


def _report(system) -> dict:
    answer = system.http().get("/monitor/profiles", params={"model": CHAT, "limit": 1000})
    assert answer.status_code == 200, answer.text
    return answer.json()


def _num_mails(report: dict) -> int:
    return sum(profile["statistics"].get(PATTERN, {}).get("total", 0) for profile in report["data"])


def test_what_was_asked_and_answered_is_profiled_for_tenants_that_allow_it(system):
    before = _num_mails(_report(system))
    for i in range(NUM_CHATS):
        system.say(f"Write to reader{i}@example.org about ink.", max_tokens=12)
    quiet = json.loads(system.cli("keys", "create", "--tenant", "quiet", "--json").stdout)["key"]
    message = {"role": "user", "content": "Write to quiet@example.org about ink."}
    system.client(quiet).chat.completions.create(model=CHAT, messages=[message], max_tokens=4)

    def profiled() -> dict:
        report = _report(system)
        assert _num_mails(report) >= before + NUM_CHATS
        assert report["num_waiting"] == 0
        return report

    report = eventually_sync(profiled, 180, interval_s=0.5)
    assert _num_mails(report) == before + NUM_CHATS, "the text of a tenant that does not allow it is not profiled"
    assert (report["object"], report["sample_rate"], report["lag_s"], report["num_dropped"]) == ("list", 1.0, 0, 0)
    newest = report["data"][0]
    assert newest["model"] == CHAT and newest["num_records"] > 0 and newest["window_start"] % newest["window_s"] == 0
    for column in ("prompt.flesch_reading_ease", "response.flesch_reading_ease", "response.vader_sentiment"):
        assert {"count", "mean", "stddev", "min", "max", "quantiles"} <= set(newest["statistics"][column])
    assert newest["statistics"]["prompt.has_patterns"]["counts"]["email address"] > 0
    assert 0 < newest["statistics"]["prompt.attack_similarity"]["mean"] < 1
    assert "example.org" not in json.dumps(report)
    _check_metrics(system)


def _check_metrics(system) -> None:
    metrics = system.metrics("monitor")
    (profiled,) = re.findall(r'^pressroom_monitor_samples_total\{outcome="profiled"\} ([\d.e+]+)$', metrics, re.M)
    assert float(profiled) >= NUM_CHATS
    assert re.search(r"^pressroom_monitor_lag_seconds 0\.0$", metrics, re.M)
    assert re.search(r'^pressroom_monitor_column_mean\{column="prompt.lexicon_count",model=', metrics, re.M)


def test_profiles_need_a_key(system):
    assert system.http(key="none").get("/monitor/profiles").status_code == 401
