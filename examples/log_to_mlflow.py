"""Logs a learning run to MLflow: settings, each candidate's curves, test metrics, and the registered task.

Run `pip install mlflow-skinny sqlalchemy` first; `mlflow ui --backend-store-uri sqlite:///mlflow.db` shows the result.
"""

from __future__ import annotations

import math

import mlflow

from addenda import LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import digits
from addenda.learner import Epoch


def log(epoch: Epoch) -> None:
    """Logs the results of an epoch for each candidate."""
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        for number, value in enumerate(getattr(epoch, name)):  # the refit has no validation
            if math.isfinite(value):  # NaN once a candidate has stopped
                mlflow.log_metric(f"{epoch.phase}/{name}/{number}", value, step=epoch.epoch)


mlflow.set_tracking_uri("sqlite:///mlflow.db")
mlflow.set_experiment("digits")
config = LearnConfig(epochs=4)
with Registry.open("mlflow-tasks.db") as registry, mlflow.start_run(run_name="three-or-eight"):
    mlflow.log_params(config.to_json())
    candidates = {str(number): settings._asdict() for number, settings in enumerate(config.candidates)}
    mlflow.log_dict(candidates, "candidates.json")
    learner = Learner(load_backbone("glyphs"), registry)
    train, test = (digits((3, 8), test, limit=80) for test in (False, True))
    task = learner.learn("three-or-eight", train, test, config, on_epoch=log)
    mlflow.log_metrics({f"test/{name}": task.metrics["test"][name] for name in ("accuracy", "balanced_accuracy")})
    mlflow.set_tags({"task": task.ref, "sha256": task.sha256})

print(f"{task.ref}: {len(task.metrics['curves'])} epochs of the sweep are in mlflow.db")
