"""A stand-in for Transformer Engine 2.11 in plain torch: what Megatron-Core's layers, optimizer and gradient norm take of it.

It plays what a user of the modules can see: constructors with Transformer Engine's own arguments (any other is a TypeError),
names, shapes and marks of the parameters, the collectives of each parallel mode, `fuse_wgrad_accumulation` into `main_grad`
with an empty gradient for autograd, `_extra_state`, what attention over packed sequences wants of its arguments, and the
refusal of tensors on another device than CUDA's. What Transformer Engine leaves undefined is NaN here: the empty gradients, and
attention's output beyond the last sequence.

It does not play FP8, user buffers, fused kernels, the choice of an attention backend, dropout, nor Transformer Engine's own
context parallelism; asking for one of them raises NotImplementedError.

Put its folder first on the path of a process before Megatron-Core is imported there.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
