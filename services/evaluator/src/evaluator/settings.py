"""What the evaluator is told by its environment, with the prefix EVALUATOR_."""

from chassis.settings import ServiceSettings, settings_config


class EvaluatorSettings(ServiceSettings):
    """Settings of the evaluator: those that every service has."""

    model_config = settings_config("EVALUATOR_")
