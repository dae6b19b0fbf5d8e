"""Speed of the data path against named peers, as ratios within one run. See docs/performance.md."""
