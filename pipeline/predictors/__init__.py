"""From decoded pixels to features and labels: torch here, Triton elsewhere, or nothing at all (for measuring)."""
