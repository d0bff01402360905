"""What the monitor is told by its environment, with the prefix MONITOR_."""

from chassis.settings import ServiceSettings, settings_config


class MonitorSettings(ServiceSettings):
    """Settings of the monitor: those that every service has."""

    model_config = settings_config("MONITOR_")
