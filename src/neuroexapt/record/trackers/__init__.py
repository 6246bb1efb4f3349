"""Experiment trackers that a user already has: one file each, needed packages as extras.

``told.py`` says what an event is as numbers and sentences; an adapter hands these on.
"""

from neuroexapt.record.trackers.mlflow import MLflow
from neuroexapt.record.trackers.tensorboard import TensorBoard
from neuroexapt.record.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "WandB"]
