"""Models: tensors in, tensors out. Import the parts you need; only `card` is free of torch."""
