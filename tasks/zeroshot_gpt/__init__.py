"""Tasks that a GPT does as it is, without finetuning."""
