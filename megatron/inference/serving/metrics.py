"""GET /metrics, in the text format that Prometheus reads."""

from __future__ import annotations

from megatron.inference.serving.loop import EngineLoop


def exposition(loop: EngineLoop) -> str:
    """One sample a line, each with its help and type."""
    counters, engine = loop.counters, loop.engine
    allocator = engine.context.chunk_allocator
    waits = sorted(counters.first_token_seconds)
    samples = [
        ("requests_total", "counter", "requests taken", counters.requests),
        ("requests_completed_total", "counter", "requests that came to their end", counters.completed),
        (
            "requests_cancelled_total",
            "counter",
            "requests whose client went away, or that met a stop text",
            counters.cancelled,
        ),
        ("requests_rejected_total", "counter", "requests refused because too many waited", counters.rejected),
        ("prompt_tokens_total", "counter", "tokens of prompts", counters.prompt_tokens),
        ("generated_tokens_total", "counter", "tokens generated", counters.generated_tokens),
        ("passes_total", "counter", "passes of the model", counters.passes),
        ("busy_seconds_total", "counter", "seconds in passes", counters.busy_seconds),
        ("requests_running", "gauge", "requests in the context", len(engine.context.sequences)),
        ("requests_waiting", "gauge", "requests that wait for room", len(engine.waiting)),
        ("chunks_free", "gauge", "free chunks of the cache", allocator.chunk_count_avail),
        (
            "chunks_remembered",
            "gauge",
            "chunks that only the cache of beginnings holds",
            engine.context.prefix_cache.num_spare,
        ),
        ("chunks", "gauge", "chunks of the cache", allocator.chunk_count_total - 1),
        ("first_token_seconds_median", "gauge", "of the last 1000 requests", waits[len(waits) // 2] if waits else 0),
    ]
    lines = []
    for name, kind, words, value in samples:
        lines += [f"# HELP megatron_{name} {words}", f"# TYPE megatron_{name} {kind}", f"megatron_{name} {value}"]
    return "\n".join(lines) + "\n"
