"""Low-rank adapters: made, merged, and exchanged with PEFT."""
