"""An independent statement of what the trainer must compute, on plain transformers and autograd; nothing of kdrl_mcore."""
