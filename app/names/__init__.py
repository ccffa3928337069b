"""Class names, and the namespaces that label sets belong to."""
