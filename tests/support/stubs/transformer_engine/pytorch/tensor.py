"""The name of the quantized tensors, of which there are none here."""


class QuantizedTensor: ...
