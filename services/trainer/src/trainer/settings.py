"""What the trainer is told by its environment, with the prefix TRAINER_."""

from chassis.settings import ServiceSettings, settings_config


class TrainerSettings(ServiceSettings):
    """Settings of the trainer: those that every service has."""

    model_config = settings_config("TRAINER_")
