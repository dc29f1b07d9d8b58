"""Which leaf goes to Muon, by what a program does with it."""
