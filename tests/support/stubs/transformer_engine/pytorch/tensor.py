"""The type of quantized tensors, of which there are none here."""


class QuantizedTensor: ...
