"""Few-shot classification: example images, and the adapters fitted to them."""
