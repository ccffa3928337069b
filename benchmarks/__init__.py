"""What the service can do on a machine, as ratios within one run."""
