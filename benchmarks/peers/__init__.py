"""Other ways to serve the same architecture, as their users would write them."""
