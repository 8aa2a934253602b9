"""Making a checkpoint: cached latents, views, the start as a discriminant, the card, export."""
