"""What is shipped with the code: maps, weights and demo cases; see `ATTRIBUTION.md`."""
