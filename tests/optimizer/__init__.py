"""The story of one device: Newton-Schulz, matrices, momentum, scales, and `muon` made of them."""
