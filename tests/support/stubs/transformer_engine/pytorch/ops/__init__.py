"""Names of the operation-based interface, which Megatron-Core mentions in annotations and uses only on request."""


class FusibleOperation: ...


class Sequential(FusibleOperation): ...
