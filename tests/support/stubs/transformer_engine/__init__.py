"""A stand-in for Transformer Engine 2.11 in plain torch: what Megatron-Core's layers, optimizer and gradient norm use of it.

It imitates what a user of the modules can see: constructors with Transformer Engine's arguments (any other is a TypeError),
names, shapes and attributes of the parameters, the collectives of each parallel mode, `fuse_wgrad_accumulation` into
`main_grad` with an empty gradient for autograd, `_extra_state`, what attention over packed sequences requires of its arguments,
and the refusal of tensors on a device other than CUDA's. What Transformer Engine leaves undefined is NaN here: the empty
gradients, and the attention's output beyond the last sequence.

It does not imitate FP8, user buffers, fused kernels, the choice of an attention backend, dropout, or Transformer Engine's own
context parallelism; asking for one of them raises NotImplementedError.

Put its folder first on `sys.path` before the process imports Megatron-Core.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
