"""Loggers of a run's metrics besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio, or one of your own."""
