"""Other servers with the same architecture, as their users would write them."""
