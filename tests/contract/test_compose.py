"""docker-compose.yml runs the launcher's system: the same services and settings, nothing open, no secret in it."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from chassis.settings import ServiceSettings
from devstack import topology
from devstack.home import Home, read_pairs
from testkit import dockerfiles, sources
from testkit.sources import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
BLOCKS = COMPOSE["services"]
SERVICES = sources.service_names()
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRETS = {"KEY_PEPPER", "NATS_PASSWORD", "VALKEY_PASSWORD", "PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY"}
# The launcher's alone: local spans are read by its command line. In containers a collector takes their place.
LAUNCHER_ONLY = {"TRACE_DIR"}


@pytest.fixture(scope="module")
def env_file(tmp_path_factory) -> dict[str, str]:
    """What tools/compose_env.py makes, in a copy of the checkout's relevant part, with its mode and what it printed."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "libs").symlink_to(ROOT / "libs")
    (root / "tools").mkdir()
    script = root / "tools" / "compose_env.py"
    script.write_text((ROOT / "tools" / "compose_env.py").read_text())
    env = {name: value for name, value in os.environ.items() if not name.startswith("PRESSROOM_")}

    def run(**extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", script]
        return subprocess.run(command, env=env | extra, capture_output=True, text=True, timeout=60)

    first = run()
    assert first.returncode == 0, first.stderr
    made = read_pairs(root / ".env")
    assert (root / ".env").stat().st_mode & 0o777 == 0o600
    assert not any(made[name] in first.stdout + first.stderr for name in SECRETS)
    again = run(PRESSROOM_PORT="8123")
    assert again.returncode == 0, again.stderr
    kept = read_pairs(root / ".env")
    assert {name for name in made if made[name] != kept[name]} == {"PRESSROOM_PORT", "PRESSROOM_BASE_URL"}
    refused = run(PRESSROOM_PORT="eight")
    assert refused.returncode == 1 and "PRESSROOM_PORT" in refused.stderr
    assert read_pairs(root / ".env") == kept
    return kept


def _filled(value: object, variables: dict[str, str]) -> str:
    """A value as compose would fill it in."""

    def fill(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in variables:
            return variables[name]
        assert kind == "-", f"{name} is neither made by tools/compose_env.py nor has a default"
        return rest

    return VARIABLE.sub(fill, str(value))


def _environment(service: str, variables: dict[str, str]) -> dict[str, str]:
    """What the process is told: by its image, then by compose."""
    told = dockerfiles.read(ROOT / "services" / service / "Dockerfile")[-1].env()
    return told | {name: _filled(value, variables) for name, value in BLOCKS[service]["environment"].items()}


def _settings(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"{service}.settings")
    (found,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, ServiceSettings) and c is not ServiceSettings
    ]
    return found


def test_compose_runs_what_the_launcher_runs_and_fills_the_model_store_first():
    assert set(BLOCKS) == {*topology.NAMES, "init"}
    for name in ("embedder", "generator", "trainer", "monitor"):
        assert BLOCKS[name]["depends_on"] == {"init": {"condition": "service_completed_successfully"}}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_container_is_shut_in(name):
    block = BLOCKS[name]
    assert block["read_only"] is True
    assert block["cap_drop"] == ["ALL"] and "cap_add" not in block and "privileged" not in block
    assert block["security_opt"] == ["no-new-privileges:true"]
    assert all("size=" in mount for mount in block["tmpfs"]), "a tmpfs without a size grows into the memory"
    assert block["mem_limit"] and block["cpus"] and block["pids_limit"]
    assert block["logging"]["options"]["max-size"], "logs without a bound fill the disk"
    assert block["restart"] == ("on-failure" if name == "init" else "unless-stopped")
    assert "user" not in block, "the image's own user, which is not root"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_container_runs_an_image_of_ours_with_a_version(name):
    block = BLOCKS[name]
    image, _, tag = block["image"].partition(":")
    built = "models" if name == "init" else name
    assert image == f"pressroom/{built}" and tag not in ("", "latest")
    folder = "services" if name in SERVICES else "deploy"
    assert block["build"] == {"context": ".", "dockerfile": f"{folder}/{built}/Dockerfile"}


def test_only_the_gateway_is_published_and_only_to_this_machine():
    assert {name for name in BLOCKS if "ports" in BLOCKS[name]} == {"gateway"}
    published = ["127.0.0.1:${PRESSROOM_PORT:-8000}:8000", "127.0.0.1:${PRESSROOM_GRPC_PORT:-8001}:8001"]
    assert BLOCKS["gateway"]["ports"] == published
    # What is published of gRPC asks for keys: never the port that believes what our services say of tenants.
    assert BLOCKS["gateway"]["environment"]["GATEWAY_PUBLIC_GRPC_PORT"] == "8001"
    assert {name for name in BLOCKS if BLOCKS[name]["networks"] != ["inside"]} == {"gateway"}
    assert COMPOSE["networks"]["inside"] == {"internal": True}


def test_no_secret_has_a_default_and_all_are_made(env_file):
    text = "\n".join(line for line in (ROOT / "docker-compose.yml").read_text().splitlines() if "#" not in line)
    kinds: dict[str, set[str]] = {}
    for name, kind, _ in VARIABLE.findall(text):
        kinds.setdefault(name, set()).add(kind)
    assert {name for name in kinds if kinds[name] == {"?"}} == SECRETS
    assert set(env_file) >= SECRETS
    ignored = [(ROOT / name).read_text().splitlines() for name in (".gitignore", ".dockerignore")]
    assert ".env" in ignored[0] and "*" in ignored[1]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_told_what_its_settings_ask_for(service, env_file, monkeypatch):
    """Every variable is a field, every field that must be given is given, and every value fits."""
    told = _environment(service, env_file)
    prefix = f"{service.upper()}_"
    for name in [name for name in os.environ if name.startswith(prefix)]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    try:
        settings = _settings(service)()
    except ValidationError as error:
        pytest.fail(f"docker-compose.yml: {service}: {error}")
    fields = {name.removeprefix(prefix).lower() for name in told if name.startswith(prefix)}
    assert fields <= set(type(settings).model_fields), "a variable that nothing reads"
    assert settings.host == "0.0.0.0"
    assert settings.log_format == "json"
    foreign = {name for name in told if name.startswith(tuple(f"{s.upper()}_" for s in SERVICES if s != service))}
    assert foreign == set()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_told_what_the_launcher_tells_it(service, env_file, tmp_path):
    prefix = f"{service.upper()}_"
    ports = {name: 1000 + offset for name, offset in topology.PORT_OFFSETS.items()}
    secrets = dict.fromkeys(("NATS_PASSWORD", "VALKEY_PASSWORD", "KEY_PEPPER"), "x" * 16)
    client = dict.fromkeys(("PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY"), "sk-x-x")
    wiring = topology.Wiring(Home(tmp_path), ports, secrets, client, "INFO", 2, {})
    (row,) = [row for row in topology.ROWS if row.name == service]
    launched = {name.removeprefix(prefix) for name in topology._service(row, wiring).env if name.startswith(prefix)}
    contained = {name.removeprefix(prefix) for name in _environment(service, env_file) if name.startswith(prefix)}
    assert contained == launched - LAUNCHER_ONLY


@pytest.mark.parametrize("service", SERVICES)
def test_addresses_lead_to_a_service_and_a_port_that_it_listens_on(service, env_file):
    listens = {
        name: (dockerfiles.read(ROOT / path)[-1].last("EXPOSE") or "").split()
        for name, path in ((name, block["build"]["dockerfile"]) for name, block in BLOCKS.items())
    }
    found = 0
    for name, value in _environment(service, env_file).items():
        if name.endswith(("_ADDR", "_URL", "_URI")):
            host, port = re.search(r"(?:^|@|//)([a-z]+):(\d+)(?:/\d+)?$", value).groups()
            assert port in listens.get(host, []), f"{service}: {name}"
            if name.endswith("_ADDR"):
                assert port == "9000" and host == name.removeprefix(f"{service.upper()}_").removesuffix("_ADDR").lower()
            found += 1
    assert found >= 1


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_kept_lies_in_a_volume_that_the_image_gives_to_its_user(name):
    """A container's /data or /models has a volume; the model store is written by init and trainer alone."""
    mounts = dict(mount.split(":", 1) for mount in BLOCKS[name].get("volumes", []))
    assert set(mounts) <= set(COMPOSE["volumes"])
    own = {volume: place for volume, place in mounts.items() if volume != "models"}
    assert own in ({}, {f"{name}-data": "/data"})
    if "models" in mounts:
        assert mounts["models"] == ("/models" if name in ("init", "trainer") else "/models:ro")
    told = {str(value) for value in BLOCKS[name].get("environment", {}).values()}
    places = {place.split(":")[0] for place in mounts.values()}
    assert {path for path in told if path.startswith("/") and not path.startswith(tuple(places))} == set()


def _directives(text: str, known: dict[str, str]) -> list[str]:
    """A configuration's lines without comments, with the launcher's own values put in."""
    lines = [line.strip() for line in text.format(**known).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_bus_and_valkey_are_configured_as_the_launcher_does():
    nats = topology._NATS_CONFIG.replace('"{password}"', "{password}")
    known = {"host": "0.0.0.0", "port": "4222", "http_port": "8222", "store": "/data"}
    ours = (ROOT / "deploy/nats/nats.conf").read_text()
    assert [line for line in ours.splitlines() if line and not line.startswith("#")] == _directives(
        nats, known | {"password": "$NATS_PASSWORD_QUOTED"}
    )
    known = {"host": "0.0.0.0", "port": "6379", "folder": "/tmp", "password": "${VALKEY_PASSWORD:?set VALKEY_PASSWORD}"}
    expected = _directives(topology._VALKEY_CONFIG, known)
    ours = (ROOT / "deploy/valkey/valkey.conf").read_text()
    told = [line for line in ours.splitlines() if line and not line.startswith("#")]
    (password,) = re.findall(r"^requirepass .*$", (ROOT / "deploy/valkey/start.sh").read_text(), re.MULTILINE)
    assert sorted([*told, password]) == sorted(expected)


def test_the_servers_tags_are_those_that_the_stand_ins_take():
    script = (ROOT / "deploy/standins/build.sh").read_text()
    for name in ("nats", "valkey"):
        base = dockerfiles.read(ROOT / "deploy" / name / "Dockerfile")[0].base
        assert re.search(rf"{name}\.Dockerfile -t docker\.io/(?:library/)?{re.escape(base)} ", script), base


def test_the_gpu_file_changes_embedder_and_generator_alone_to_what_they_know():
    blocks = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    assert set(blocks) == {"embedder", "generator"}
    for service, block in blocks.items():
        assert block["build"] == {"args": {"VARIANT": "gpu"}}
        assert block["image"] == BLOCKS[service]["image"] + "-gpu", "one tag for both would serve the wrong one"
        fields = {name.removeprefix(f"{service.upper()}_").lower() for name in block.get("environment", {})}
        assert fields <= set(_settings(service).model_fields)
        (device,) = block["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
