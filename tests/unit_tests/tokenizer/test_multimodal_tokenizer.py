from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.multimodal_tokenizer import PROMPT_FORMATS, MultimodalTokenizer

CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
MARKS = {
    "mistral": ["[INST]", "[/INST]", "<s>"],
    "chatml": CHATML,
    "nvlm-yi-34b": CHATML,
    "qwen2p0": CHATML,
    "qwen2p5": CHATML,
    "llama3": LLAMA3,
    "llama3p1": [*LLAMA3, "<|finetune_right_pad_id|>"],
    "nemotron5-aligned": ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>"],
}
TALK = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A duck."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module", params=MARKS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prompt format, and a folder with a tokenizer of bytes that has its marks."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="</s>", unk_token="<unk>")
    made.add_tokens(MARKS[request.param], special_tokens=True)
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    made.save_pretrained(folder)
    return request.param, folder


def build(saved: tuple[str, str], **settings: Any) -> MultimodalTokenizer:
    args = {"tokenizer_type": "MultimodalTokenizer", "tokenizer_model": saved[1], "tokenizer_prompt_format": saved[0]}
    return build_tokenizer(SimpleNamespace(**(args | settings)))


def test_every_format_says_what_is_learned(saved: tuple[str, str]) -> None:
    tokenizer = build(saved, image_tag_type="nvlm")
    ids, target = tokenizer.tokenize_conversation(TALK, return_target=True, add_generation_prompt=False)
    form = PROMPT_FORMATS[saved[0]]
    answers = [turn["content"] + form.ends["assistant"] for turn in TALK if turn["role"] == "assistant"]
    assert tokenizer.detokenize(target[target != -100]) == "".join(answers)
    assert numpy.array_equal(ids[target != -100], target[target != -100])
    text = tokenizer.detokenize(ids)
    assert text.startswith(form.start) and "<Image><image></Image>\nWhat is this?" in text
    assert (form.default_system or "") in text and text.endswith(form.ends["assistant"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.tolist().count(image) == 1 and {"<image>", "<Image>"} <= set(tokenizer.get_special_tokens())
    assert tokenizer.vocab["<image>"] == image < tokenizer.vocab_size and tokenizer.inv_vocab[image] == "<image>"
    assert tokenizer.tokenize("a<image>b") == [
        tokenizer.convert_tokens_to_ids(token) for token in ("a", "<Image>", "<image>", "</Image>", "b")
    ]
    pad = "<unk>" if form.pad is None else form.pad
    assert (tokenizer.pad, tokenizer.eod) == tuple(tokenizer.convert_tokens_to_ids([pad, "</s>"]))


def test_a_prompt_is_the_beginning_of_its_conversation(saved: tuple[str, str]) -> None:
    tokenizer = build(saved)
    prompt = tokenizer.tokenize_conversation(TALK[:3], return_target=False, add_generation_prompt=True)
    whole = tokenizer.tokenize(TALK)
    assert whole[: len(prompt)] == prompt.tolist()
    assert tokenizer.detokenize(whole[len(prompt) :]).startswith("Yes.")


def test_a_system_message_is_kept_or_forced(saved: tuple[str, str]) -> None:
    form = PROMPT_FORMATS[saved[0]]
    if form.default_system is None:
        with pytest.raises(ValueError, match="has no message of the system"):
            build(saved, force_system_message=True)
        return
    talk = [{"role": "system", "content": "Be rude."}, *TALK]
    assert "Be rude." in build(saved).detokenize(build(saved).tokenize(talk))
    forced = build(saved, force_system_message=True)
    assert forced.tokenize(talk) == forced.tokenize(TALK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_prompt_format": "morse"}, "--tokenizer-prompt-format morse is unknown: choose one of 'mistral'"),
        ({"tokenizer_prompt_format": "nemotron5"}, "--tokenizer-prompt-format nemotron5 is unknown: choose one of"),
        ({"image_tag_type": "frame"}, "--image-tag-type frame is unknown: choose one of '', 'nvlm'"),
    ],
)
def test_unknown_names_are_refused(saved: tuple[str, str], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(saved, **settings)


def test_turns_that_cannot_be_are_named(saved: tuple[str, str]) -> None:
    tokenizer = build(saved)
    with pytest.raises(ValueError, match="has no messages"):
        tokenizer.tokenize([])
    with pytest.raises(ValueError, match=r"needs a role \(.*\) and a content that is text, it has role 'cat'"):
        tokenizer.tokenize([{"role": "cat", "content": "miaow"}])
    if saved[0] != "llama3":
        return
    other = build(saved)._tokenizer
    with pytest.raises(ValueError, match=r"no token that pads \(<SPECIAL_233>\)"):
        MultimodalTokenizer(other, "nemotron5-aligned")
