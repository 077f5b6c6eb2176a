"""Sweeps: what varies (`grid`), how cells are measured (`lanes`), kept (`ledger`) and told."""
