"""Programs that measure the service, as ratios within one run."""
