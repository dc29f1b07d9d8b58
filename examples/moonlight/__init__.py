"""A small Moonlight: the Mixture-of-Experts transformer of the Muon paper, trained on real text."""
