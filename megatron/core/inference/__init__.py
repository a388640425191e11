"""Generating text from a model: requests, caches of keys and values, engines that batch them.

- `engines` take requests and give texts: continuous batching (`DynamicInferenceEngine`), or one batch at a time.
- `contexts` hold what a model remembers of the tokens it has seen, and attend to it.
- `model_inference_wrappers` run a model with a context under any layout; `text_generation_controllers` draw tokens.
"""
