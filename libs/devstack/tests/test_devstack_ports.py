import os
import socket
import subprocess
import sys

from devstack import ports, topology
from devstack.ports import Holder
from devstack.up import describe_holder


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_busy_port_names_its_holder_with_pid_and_command() -> None:
    program = (
        "import socket, sys\ns = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "print(s.getsockname()[1], flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        [found] = ports.busy([port])
        assert found.pid == process.pid
        assert "-c import socket, sys" in found.what
        line = describe_holder(found, "gateway.http")
        assert str(port) in line and str(process.pid) in line and "gateway.http" in line
        process.stdin.close()


def test_holder_of_another_user_is_said_to_be_one() -> None:
    line = describe_holder(Holder(80, None, "a process of user www-data (see it with: ...)"), "gateway.http")
    assert "user www-data" in line and "pid" not in line


def test_free_port_is_free_and_not_listed() -> None:
    listener = _listener()
    port = listener.getsockname()[1]
    assert not ports.is_free(port)
    assert ports.listens(os.getpid(), port)
    listener.close()
    assert ports.is_free(port)
    assert not ports.listens(os.getpid(), port)
    assert ports.busy([port]) == []


def test_base_port_zero_gives_distinct_free_ports_below_the_ephemeral_range() -> None:
    plan = ports.plan(0, topology.PORT_OFFSETS)
    assert plan.keys() == topology.PORT_OFFSETS.keys()
    assert len(set(plan.values())) == len(plan)
    assert all(port < 32768 for port in plan.values())


def test_base_port_fixes_all_ports() -> None:
    assert ports.plan(8000, topology.PORT_OFFSETS)["milvus"] == 8017
