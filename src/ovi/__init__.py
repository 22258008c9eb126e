"""ovi: a training and ablation bench for twin-backbone joint audio-video diffusion."""
