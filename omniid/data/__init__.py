"""Identity records: reading, sampling and synthetic people."""
