"""One architecture per file; they import torch and the settings, nothing else."""
