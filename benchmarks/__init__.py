"""Performance, measured as ratios within one run on one machine. ``make bench`` runs it; README.md keeps what came out."""
