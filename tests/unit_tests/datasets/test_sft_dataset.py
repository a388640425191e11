import copy
import json
from pathlib import Path

import pytest
import torch

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training.datasets.sft_dataset import SFTDataset, SFTLowLevelDataset
from megatron.training.tokenizer.sft_tokenizer import SFTTokenizer
from tests.functional_tests.program import TINY, run_program, train_rows
from tests.unit_tests.datasets.data_files import gpt_config
from tests.worker_pool import run_ranks

TALK = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "Hi!\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]
TEXT = (
    "<SPECIAL_10>System\nBe kind.\n",
    "<SPECIAL_11>User\nHi!\n<SPECIAL_11>Assistant\n",
    "Hello\n",
    "<SPECIAL_11>User\nWho?\n<SPECIAL_11>Assistant\n",
    "Me.\n",
)


def write_tokenizer(path: Path, pieces: list[str] | None = None) -> str:
    """Single characters, the special tokens of the format, and `pieces` merged of two characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(code): i for i, code in enumerate([10, *range(32, 127)])}
    merges = [tuple(piece) for piece in pieces or []]
    vocab = letters | {"".join(merge): len(letters) + i for i, merge in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("sft") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: str) -> SFTTokenizer:
    return SFTTokenizer(tokenizer_path, "nemotron-h-aligned")


def ids_of(tokenizer: SFTTokenizer, text: str) -> list[int]:
    return tokenizer.tokenize(text)


def test_conversation_is_written_down_and_only_answers_are_learned(tokenizer: SFTTokenizer) -> None:
    ids, target = tokenizer.tokenize_conversation(TALK, return_target=True)
    assert ids.tolist() == ids_of(tokenizer, "".join(TEXT)) == tokenizer.tokenize(TALK)
    assert ids.tolist().count(tokenizer.convert_tokens_to_ids(["<SPECIAL_11>"])[0]) == 4
    expected = [token if i in (2, 4) else -100 for i, text in enumerate(TEXT) for token in ids_of(tokenizer, text)]
    assert target.tolist() == expected
    assert tokenizer.detokenize(ids) == "".join(TEXT)
    special = tokenizer.convert_tokens_to_ids(["</s>", "<SPECIAL_233>"])
    assert [tokenizer.eod, tokenizer.pad] == special and "<SPECIAL_11>" in tokenizer.get_special_tokens()
    with pytest.raises(NotImplementedError):
        _ = tokenizer.bos
    assert tokenizer.unique_identifiers["class"] == "SFTTokenizer"
    assert tokenizer.unique_identifiers["prompt_format"] == "nemotron-h-aligned"


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "no messages"),
        ([{"role": "assistant", "content": "x"}], "follows no message of the user"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}], "is empty"),
        ([{"role": "tool", "content": "x"}], "needs a role"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        ([{"content": "x"}], "needs a role"),
    ],
)
def test_conversations_that_cannot_be(tokenizer: SFTTokenizer, talk: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize_conversation(talk)


def test_tokens_across_turns_are_refused(tmp_path: Path) -> None:
    tokenizer = SFTTokenizer(write_tokenizer(tmp_path / "t", ["\nH"]), "nemotron-h-aligned")
    with pytest.raises(ValueError, match="joins the end of a turn to the beginning of the next"):
        tokenizer.tokenize_conversation(TALK)


def test_tokenizers_without_the_special_tokens_are_refused(tokenizer_path: str, tmp_path: Path) -> None:
    text = (Path(tokenizer_path) / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("SPECIAL_233", "SPECIAL_234"))
    with pytest.raises(ValueError, match="has not the token <SPECIAL_233>"):
        SFTTokenizer(str(tmp_path), "nemotron-h-aligned")
    with pytest.raises(ValueError, match="choose one of nemotron-h-aligned"):
        SFTTokenizer(tokenizer_path, "chatml")


def talks(count: int) -> list[dict]:
    return [
        {"messages": [*TALK[:2], {"role": "assistant", "content": f"number {k} " * (k + 1)}], "id": k}
        for k in range(count)
    ]


def write_lines(path: Path, count: int) -> str:
    path.write_text("\n".join(json.dumps(talk) for talk in talks(count)) + "\n\n")
    return str(path)


def build(tokenizer: SFTTokenizer, path: str, sizes: list[int | None], **settings: object) -> list:
    given = {"blend": ([path], None), "split": "75,25,0", "sequence_length": 80} | settings
    config = gpt_config(tokenizer=tokenizer, **given)
    return BlendedMegatronDatasetBuilder(SFTDataset, sizes, lambda: True, config).build()


def test_items(tokenizer: SFTTokenizer, tmp_path: Path) -> None:
    train, valid, test = build(tokenizer, write_lines(tmp_path / "d.jsonl", 8), [10, 2, 0])
    assert test is None and (len(train), len(valid)) == (10, 2)
    assert train.samples_per_epoch() == 6 and valid.origin(1).parts[0].document == 7
    for k in range(10):
        item, (ids, target) = train[k], tokenizer.tokenize_conversation(talks(8)[k % 6]["messages"])
        kept = min(len(ids), 79)
        text = [*ids[:kept].tolist(), tokenizer.eod] + [tokenizer.pad] * (80 - kept)
        assert item["tokens"].tolist() == text[:-1]
        learned = [*(target[1:kept] != -100).tolist(), True] + [False] * (80 - kept)
        assert item["loss_mask"].tolist() == [float(x) for x in learned]
        labels = torch.tensor(text[1:])
        assert torch.equal(item["labels"][item["loss_mask"] == 1], labels[torch.tensor(learned)])
        assert item["labels"].min() >= 0 and item["position_ids"].tolist() == list(range(80))
        assert train.origin(k).parts[0].epoch == k // 6
    assert (train[5]["tokens"] != tokenizer.pad).all() and train[5]["labels"][-2] == tokenizer.eod  # was too long


def test_files(tokenizer: SFTTokenizer, tmp_path: Path) -> None:
    lines = SFTLowLevelDataset(write_lines(tmp_path / "d.jsonl", 5))
    (tmp_path / "list.json").write_text(json.dumps(talks(5), indent=1))
    listed = SFTLowLevelDataset(str(tmp_path / "list.json"))
    assert len(lines) == len(listed) == 5
    assert [lines[k] for k in range(5)] == [listed[k] for k in range(5)]
    assert copy.deepcopy(lines)[3] == lines[3]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"messages": [\n{"text": "x"}\n')
    dataset = SFTLowLevelDataset(str(bad))
    for k, message in ((0, r"bad.jsonl, line 2: no JSON"), (1, r"bad.jsonl, line 3: an object with a list")):
        with pytest.raises(ValueError, match=message):
            dataset[k]
    bad.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        SFTLowLevelDataset(str(bad))


def test_what_is_refused(tokenizer: SFTTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", 3)
    with pytest.raises(ValueError, match="reset_position_ids has no meaning"):
        build(tokenizer, path, [1, 1, 1], reset_position_ids=True)
    with pytest.raises(ValueError, match="valid split of .* has none of its 3 conversations"):
        build(tokenizer, path, [1, 1, 1], split="99,1,0")
    with pytest.raises(ValueError, match="name a file of conversations"):
        SFTDataset.build_low_level_dataset(None, None)


def test_training_on_conversations(tokenizer_path: str, tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", 30) for name in "ab"]
    words = [word for word in TINY if word not in ("--mock-data", "NullTokenizer", "--vocab-size", "60")]
    words[words.index("--tokenizer-type")] = "--sft"
    blend = f"--data-path 1 {paths[0]} 3 {paths[1]} --split 1,0,0 --tokenizer-type SFTTokenizer"
    long = "--seq-length 128 --max-position-embeddings 128 --train-iters 8 --attention-dropout 0 --hidden-dropout 0"
    flags = [*words, *blend.split(), *long.split(), "--tokenizer-model", tokenizer_path]
    losses = []
    for world_size in (1, 2):
        file = tmp_path / f"{world_size}.jsonl"
        run_ranks(world_size, run_program, "pretrain_gpt.py", [*flags, "--metrics-jsonl", str(file)])
        losses.append([row["lm loss"] for row in train_rows(file)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0] - 0.1
    with pytest.raises(AssertionError, match="--sft needs --tokenizer-type SFTTokenizer"):
        wrong = ["NullTokenizer" if word == "SFTTokenizer" else word for word in flags]
        run_ranks(1, run_program, "pretrain_gpt.py", [*wrong, "--vocab-size", "90"])
