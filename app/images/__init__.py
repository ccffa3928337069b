"""Images: finding, fetching and decoding them."""
