"""An independent statement of what the trainer must compute, with plain transformers and autograd and nothing of kdrl_mcore."""
