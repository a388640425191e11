"""EleutherAI's lm-eval harness, with a GPT of any checkpoint and layout as its model."""
