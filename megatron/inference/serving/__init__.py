"""Text generation over HTTP.

- `loop` runs an engine on all ranks of a model and hands it what rank 0 is asked for.
- `progress` is what a request's client sees of it: tokens, text, endings.
- `app` puts the routes together: `legacy_api` (PUT /api), `completions`, `openai_api` (/v1/...), `metrics`.
"""
