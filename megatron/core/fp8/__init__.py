"""Matrix products of 8-bit floats: how operands are scaled (`recipes`, `quantization`, `delayed`), how they are
multiplied (`scaled_product`), and the linear layers' three products made of both (`products`, `attach`)."""
