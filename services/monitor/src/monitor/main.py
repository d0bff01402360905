"""Composition root of the monitor: the only file that knows every concrete class."""

import sys

from pressroom.monitor.v1 import monitor_pb2_grpc

from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts.subjects import EVENTS_REQUEST_COMPLETED, STREAMS
from monitor.api.consumers import DURABLE, RequestRecords
from monitor.api.grpc import MonitorServicer
from monitor.backends.prometheus_counters import PrometheusCounters
from monitor.core.tally import Tally
from monitor.settings import MonitorSettings


def main() -> int:
    """Runs the monitor; returns the exit status."""
    settings = load_settings(MonitorSettings)

    async def setup(app: App) -> None:
        records = RequestRecords(Tally(PrometheusCounters()))
        bus = NatsBus.connect(settings.nats_url, "monitor", STREAMS)
        app.on_close(bus.close)
        app.ready_when("bus", lambda: bus.connected)
        app.set_queue_depth(lambda: bus.backlog)
        app.spawn("records", bus.consume(EVENTS_REQUEST_COMPLETED, durable=DURABLE, handler=records.handle))
        app.add_grpc(
            monitor_pb2_grpc.add_MonitorServiceServicer_to_server,
            MonitorServicer(),
            "pressroom.monitor.v1.MonitorService",
        )

    return App("monitor", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
