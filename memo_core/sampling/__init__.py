"""From a job to windows of frames: settings, schedule, guidance, conditions, noise, the VAE, the store."""
