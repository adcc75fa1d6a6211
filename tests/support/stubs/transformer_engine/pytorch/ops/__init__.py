"""Names of the operation-based interface, which Megatron-Core mentions in annotations and uses only where asked to."""


class FusibleOperation: ...


class Sequential(FusibleOperation): ...
