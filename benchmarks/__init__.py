"""Speed, as ratios against named peers in the same run; never part of the tests."""
