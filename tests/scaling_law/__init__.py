"""The study of scaling laws."""
