"""Greedy texts of the engines are those of `transformers.generate`, token for token, and so are log-probabilities."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.inference.contexts import DynamicInferenceContext, EncoderDecoderContext, cache_sizes_of
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.model_inference_wrappers.t5.t5_inference_wrapper import T5InferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.encoder_decoder_text_generation_controller import (
    EncoderDecoderTextGenerationController,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.utils import get_model_config
from tests.interop import hf_models
from tests.interop.hf_models import VOCAB, make, start
from tests.unit_tests.inference.small_models import Words
from tests.worker_pool import run_ranks

NEW, LONGEST = 12, 48
LAYOUTS = {
    "TP1": [],
    "TP2": ["--tensor-model-parallel-size", "2"],
    "TP2 sequence parallel": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "EP2": ["--expert-model-parallel-size", "2", "--tensor-model-parallel-size", "2"]
    + ["--sequence-parallel", "--expert-tensor-parallel-size", "1"],
}


def prompts() -> list[list[int]]:
    """16 of them, of 1 to 30 tokens, neither the end of a text nor its padding."""
    numbers = random.Random(3)
    return [[numbers.randrange(2, VOCAB - 1) for _ in range(numbers.randint(1, 30))] for _ in range(16)]


def mamba2(directory: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "state_size": 24, "n_groups": 2, "chunk_size": 16}
    config = hf_models.transformers.Mamba2Config(**sizes, num_hidden_layers=4, vocab_size=VOCAB)
    model = hf_models.transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    model.save_pretrained(directory)
    return model


def their_texts(model: Any, is_t5: bool) -> list[list[int]]:
    """The continuation of each prompt, one after the other; of a T5 what it makes of them."""
    model.generation_config.eos_token_id, model.generation_config.decoder_start_token_id = None, 0
    texts = []
    for prompt in prompts():
        row = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0].tolist()
        texts.append(row[1:] if is_t5 else row[len(prompt) :])
    return texts


def their_log_probs(model: Any, texts: list[list[int]], is_t5: bool) -> list[list[float]]:
    """Of all tokens but a text's first, by one full pass."""
    found = []
    for prompt, text in zip(prompts(), texts):
        row = [0, *text] if is_t5 else prompt + text
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([row])}
        with torch.no_grad():
            logits = model(**(inputs if is_t5 else {"input_ids": torch.tensor([row])})).logits[0]
        table = logits[:-1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist())
    return found


def dynamic_engine(model: list[nn.Module]) -> DynamicInferenceEngine:
    config = get_model_config(model[0])
    context = DynamicInferenceContext(
        params_dtype=torch.float32,
        num_layers=config.num_layers,
        kv_channels=1,
        num_attention_heads=1,
        max_sequence_length=LONGEST,
        buffer_size_gb=0.01,
        buffer_guaranteed_fraction=0.0,
        chunk_size_tokens=4,
        max_requests_override=16,
        max_tokens_override=40,  # prompts come in pieces
        token_multiple=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        cache_sizes=cache_sizes_of(model, torch.float32, parallel_state.get_pipeline_model_parallel_group()),
    )
    wrapper = GPTInferenceWrapper(model, InferenceWrapperConfig(config.hidden_size, torch.float32, -1, VOCAB), context)
    return DynamicInferenceEngine(TextGenerationController(wrapper, None), context, termination_id=-1)


def static_engine(model: list[nn.Module]) -> StaticInferenceEngine:
    config = InferenceWrapperConfig(
        get_model_config(model[0]).hidden_size,
        torch.float32,
        -1,
        VOCAB,
        inference_max_requests=16,
        inference_max_seq_length=LONGEST,
    )
    return StaticInferenceEngine(EncoderDecoderTextGenerationController(T5InferenceWrapper(model, config), Words()))


def joining_texts(case: str, flags: list[str], directory: Path) -> list[tuple[list[list[int]], list[list[float]]]]:
    """As `our_texts`, of a T5 whose prompts come one a pass, four at once at most."""
    model = started(case, ["--load", f"hf:{directory}", *flags])
    config = get_model_config(model[0])
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    context = EncoderDecoderContext(0, LONGEST, 4, token_multiple=multiple)
    wrapper = T5InferenceWrapper(model, InferenceWrapperConfig(config.hidden_size, torch.float32, -1, VOCAB), context)
    engine = DynamicInferenceEngine(TextGenerationController(wrapper, None), context, termination_id=-1)
    params = SamplingParams(top_k=1, num_tokens_to_generate=NEW, return_log_probs=True)
    requests = []
    for number, prompt in enumerate(prompts()):
        requests.append(engine.add_request(number, prompt, sampling_params=params))
        engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    return [([request.generated_tokens for request in requests], [request.generated_log_probs for request in requests])]


def our_texts(case: str, flags: list[str], directory: Path) -> list[tuple[list[list[int]], list[list[float]]]]:
    """(texts, log-probabilities) of the first prompt, of the first three, and of all 16."""
    params = SamplingParams(top_k=1, num_tokens_to_generate=NEW, return_log_probs=True, ignore_termination=True)
    model = started(case, ["--load", f"hf:{directory}", *flags])
    engine = static_engine(model) if case == "t5" else dynamic_engine(model)
    results = []
    for size in (1, 3, 16):
        some = prompts()[:size]
        if isinstance(engine, StaticInferenceEngine):
            encoder = [" ".join(map(str, prompt)) for prompt in some]
            requests: Any = engine.generate(["0"] * size, encoder_prompts=encoder, sampling_params=params)
        else:
            requests = engine.generate(some, params)
        texts = [torch.as_tensor(request.generated_tokens).tolist() for request in requests]
        values = [[*map(float, r.prompt_log_probs), *map(float, r.generated_log_probs)] for r in requests]
        results.append((texts, values))
    return results


def started(case: str, flags: list[str]) -> list[nn.Module]:
    if case != "mamba2":
        return start(flags, case)
    from megatron.training import get_args, get_model, initialize_megatron
    from megatron.training.checkpoint.load import load_run

    program = import_module("pretrain_mamba")
    common = "--micro-batch-size 1 --max-position-embeddings 64 --tokenizer-type NullTokenizer --vocab-size".split()
    spec = ["--spec", "megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
    before, sys.argv = sys.argv, ["test", *common, str(VOCAB - 1), *spec, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            initialize_megatron(args_defaults={"model_family": "mamba"})
            model = get_model(program.model_provider, wrap_with_ddp=False)
            load_run(get_args(), model, None, None)
    finally:
        sys.argv = before
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, texts, log-probabilities) of each case, made when it is first asked for."""
    known: dict[str, tuple[Path, list, list]] = {}

    def get(case: str) -> tuple[Path, list, list]:
        if case not in known:
            directory = tmp_path_factory.mktemp(case)
            model = mamba2(directory) if case == "mamba2" else make(case, directory)
            texts = their_texts(model, case == "t5")
            known[case] = directory, texts, their_log_probs(model, texts, case == "t5")
        return known[case]

    return get


CASES = ("gpt2", "llama", "mixtral", "mamba2", "t5")
PAIRS: list[Any] = [(case, layout) for case in CASES for layout in ("TP1", "TP2", "PP2")] + [("mixtral", "EP2")]
PAIRS += [pytest.param(case, "TP2 sequence parallel", marks=pytest.mark.slow) for case in ("mamba2", "t5")]


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", pytest.param("TP2 sequence parallel", marks=pytest.mark.slow)])
def test_texts_of_a_t5_that_join_and_leave_are_theirs(layout: str, made: Any) -> None:
    directory, texts, log_probs = made("t5")
    for rank in run_ranks(1 if layout == "TP1" else 2, joining_texts, "t5", LAYOUTS[layout], directory):
        for found, values in rank:
            assert found == texts
            for own, wanted in zip(values, log_probs):
                torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_greedy_texts_are_theirs(case: str, layout: str, made: Any) -> None:
    directory, texts, log_probs = made(case)
    for rank in run_ranks(1 if layout == "TP1" else 2, our_texts, case, LAYOUTS[layout], directory):
        for found, values in rank:
            assert found == texts[: len(found)]
            for own, wanted in zip(values, log_probs):
                torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)
