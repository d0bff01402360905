"""What /metrics tells of finetuning."""

from prometheus_client import Counter

JOBS = Counter("pressroom_train_jobs", "Training jobs that have ended.", ["outcome"])
STEPS = Counter("pressroom_train_steps", "Optimizer steps done.")
