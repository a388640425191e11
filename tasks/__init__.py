"""Programs that measure a trained model, or finetune it and measure it then."""
