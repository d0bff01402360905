"""Composition root of the monitor: the only file that knows every concrete class."""

import sys

from pressroom.monitor.v1 import monitor_pb2_grpc

from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import load_settings
from contracts.subjects import EVENTS_REQUEST_COMPLETED, STREAMS
from monitor.api.consumers import BACKOFF_S, CONCURRENCY, DURABLE, MAX_DELIVER, RequestRecords
from monitor.api.grpc import MonitorServicer
from monitor.backends.langkit_process import LangkitProcess
from monitor.backends.prometheus_counters import PrometheusCounters
from monitor.backends.sqlite_profiles import SqliteProfiles
from monitor.core.profiling import Profiling
from monitor.core.samples import Sampler
from monitor.core.tally import Tally
from monitor.settings import MonitorSettings


def main() -> int:
    """Runs the monitor; returns the exit status."""
    settings = load_settings(MonitorSettings)

    async def setup(app: App) -> None:
        store = await SqliteProfiles.open(settings.data_dir / "profiles.db", max_waiting=settings.max_waiting)
        app.on_close(store.close)
        counters = PrometheusCounters()
        profiling = Profiling(
            store,
            store,
            LangkitProcess(worker_options(settings)),
            counters,
            kept_s=settings.window_s * settings.num_windows,
            idle_s=settings.profiler_idle_s,
        )
        counters.watch(settings.sample_rate, lambda: profiling.num_waiting, lambda: profiling.lag_s)
        sampler = Sampler(rate=settings.sample_rate, window_s=settings.window_s, max_chars=settings.max_text_chars)
        records = RequestRecords(Tally(counters), sampler, profiling.admit)
        bus = NatsBus.connect(settings.nats_url, "monitor", STREAMS)
        app.on_close(bus.close)
        app.ready_when("bus", lambda: bus.connected)
        app.set_queue_depth(lambda: bus.backlog + profiling.num_waiting)
        app.spawn("profiling", profiling.run())
        app.spawn(
            "records",
            bus.consume(
                EVENTS_REQUEST_COMPLETED,
                durable=DURABLE,
                handler=records.handle,
                concurrency=CONCURRENCY,
                max_deliver=MAX_DELIVER,
                backoff_s=BACKOFF_S,
            ),
        )
        app.add_grpc(
            monitor_pb2_grpc.add_MonitorServiceServicer_to_server,
            MonitorServicer(store.newest, profiling, settings.sample_rate),
            "pressroom.monitor.v1.MonitorService",
        )

    return App("monitor", settings).run(setup)


def worker_options(settings: MonitorSettings) -> dict[str, object]:
    """What the profiler's process is told; langkit_worker.Options."""
    return {
        "encoder_dir": str(settings.encoder_dir),
        "cpu_limit_s": settings.text_cpu_limit_s,
        "log_level": settings.log_level,
        "log_format": settings.log_format,
    }


if __name__ == "__main__":
    sys.exit(main())
