"""Starting runs: the points of sweeps, on this machine and on others."""
