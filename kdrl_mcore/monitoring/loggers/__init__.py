"""Loggers of a run's metrics besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio, or a user's logger."""
