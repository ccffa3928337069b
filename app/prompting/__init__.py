"""From class names to class embeddings."""
