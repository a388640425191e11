"""Tasks for which a BERT is finetuned."""
