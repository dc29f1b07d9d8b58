"""Which leaf goes to Muon, by its name and its shape."""
