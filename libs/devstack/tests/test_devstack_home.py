import stat

from devstack import topology
from devstack.home import Home, ensure_env, ensure_secrets, read_pairs, write_private


def test_env_file_is_private_has_the_fixed_names_and_keeps_its_keys(home: Home) -> None:
    first = ensure_env(home, "http://127.0.0.1:8000/v1", "127.0.0.1:8018")
    assert stat.S_IMODE(home.env_file.stat().st_mode) == 0o600
    lines = home.env_file.read_text().splitlines()
    fixed = ["PRESSROOM_BASE_URL", "PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY"]
    assert [line.split("=")[0] for line in lines] == [*fixed, "PRESSROOM_GRPC_ADDR"]
    assert not any(line.startswith("export") for line in lines)
    second = ensure_env(home, "http://127.0.0.1:9000/v1", "127.0.0.1:8018")
    assert second["PRESSROOM_BASE_URL"] == "http://127.0.0.1:9000/v1"
    assert second["PRESSROOM_API_KEY"] == first["PRESSROOM_API_KEY"]
    assert second["PRESSROOM_ADMIN_KEY"] == first["PRESSROOM_ADMIN_KEY"]


def test_env_file_that_others_could_read_is_made_private_again(home: Home) -> None:
    ensure_env(home, "http://x/v1", "127.0.0.1:8018")
    home.env_file.chmod(0o644)
    ensure_env(home, "http://x/v1", "127.0.0.1:8018")
    assert stat.S_IMODE(home.env_file.stat().st_mode) == 0o600


def test_what_people_added_to_the_env_file_stays(home: Home) -> None:
    write_private(home.env_file, "MINE=a=b\n")
    ensure_env(home, "http://x/v1", "127.0.0.1:8018")
    assert read_pairs(home.env_file)["MINE"] == "a=b"


def test_internal_secrets_lie_in_a_private_file_of_their_own(home: Home) -> None:
    ensure_env(home, "http://x/v1", "127.0.0.1:8018")
    secrets = ensure_secrets(home)
    assert stat.S_IMODE(home.secrets_file.stat().st_mode) == 0o600
    assert ensure_secrets(home) == secrets
    assert not any(value in home.env_file.read_text() for value in secrets.values())


def test_keys_have_the_form_that_the_gateway_reads(home: Home) -> None:
    import re

    env = ensure_env(home, "http://x/v1", "127.0.0.1:8018")
    for name in ("PRESSROOM_API_KEY", "PRESSROOM_ADMIN_KEY"):
        assert re.fullmatch(r"sk-[A-Za-z0-9_]{1,64}-[A-Za-z0-9_-]{16,128}", env[name])


def test_every_port_of_the_plan_is_used_once_and_stays_on_loopback(home: Home) -> None:
    ports = {name: 8000 + offset for name, offset in topology.PORT_OFFSETS.items()}
    wiring = topology.Wiring(
        home=home,
        ports=ports,
        secrets=ensure_secrets(home),
        client_env=ensure_env(home, "http://x/v1", "127.0.0.1:8018"),
        log_level="INFO",
        num_cores=2,
        inherited={"no_proxy": "example.org"},
    )
    specs = {spec.name: spec for spec in topology.specs(wiring)}
    assert tuple(specs) == topology.NAMES
    used = [port for spec in specs.values() for port in (spec.port, spec.http_port) if port]
    used.append(int(specs["gateway"].env["GATEWAY_PUBLIC_GRPC_PORT"]))
    assert sorted(used) == sorted(ports.values()) == list(range(8000, 8019))
    assert specs["gateway"].env["GATEWAY_HTTP_PORT"] == "8000"
    assert specs["retriever"].env["RETRIEVER_GATEWAY_ADDR"] == "127.0.0.1:8001"
    assert specs["embedder"].env["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert all("0.0.0.0" not in " ".join(spec.argv) for spec in specs.values())
    assert "PRESSROOM_ADMIN_KEY" not in str(specs["monitor"].env)
    known = set(specs)
    assert all(dependency in known for spec in specs.values() for dependency in spec.depends_on)
