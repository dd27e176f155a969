"""What every training has in common: processes, checkpoints, interruption, run directory."""
