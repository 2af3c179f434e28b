"""Read, clean, split and pair rows."""
