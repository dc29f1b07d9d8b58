"""What lies in a run's folder, and who may write there."""
