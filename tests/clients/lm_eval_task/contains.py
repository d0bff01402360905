"""The metric of the task: the answer stands in the text."""


def contains(references: list[str], predictions: list[str]) -> float:
    """1.0 where the reference stands in the prediction."""
    return float(references[0].strip() in predictions[0])
