"""PAS-Net: pose and appearance fusion for action recognition."""
