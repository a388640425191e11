"""From the logits of a pass to tokens and texts."""
