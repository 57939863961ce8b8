"""Models, measurements and peers: how we know that the package keeps its word."""
