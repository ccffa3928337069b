"""Label sets: named, versioned lists of classes."""
