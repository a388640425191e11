"""Write the tables of the pages, between `<!-- table NAME -->` and `<!-- end of table -->`, from the results.

    python benchmarks/render.py            # brings the pages up to date
    python benchmarks/render.py --check    # only says which are not

A table is a function of the files under benchmarks/results; the text around it is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = tuple(ROOT / f"docs/{name}.md" for name in ("performance", "data", "fp8", "memory", "timeline"))
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = list[str]
Table = tuple[Row, list[Row]]
"""Heads of the columns, and the rows."""


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# --- training -------------------------------------------------------------------------------------------

TYPES = {"fp32": "fp32", "bf16": "bf16, fp32 main parameters"}


def speed(contender: dict[str, Any]) -> float:
    return float(contender["tokens_per_second"])


def train_gpt(name: str = "train_cpu") -> Table:
    """Our fastest way beside the fastest peer."""
    rows = []
    for result in read(name)["results"]:
        contenders, size = result["contenders"], result["size"]
        ours = max((key for key in contenders if key.startswith("ours")), key=lambda key: speed(contenders[key]))
        peer = max((key for key in contenders if not key.startswith("ours")), key=lambda key: speed(contenders[key]))
        best = result.get("best") or {"times_as_fast": speed(contenders[ours]) / speed(contenders[peer])}
        rows.append(
            [
                f"{size['layers']} layers, hidden {size['hidden']}",
                f"{size.get('batch', 4)} × {size.get('length', 512)}",
                TYPES[result["type"]],
                f"{speed(contenders[ours]):.1f}{ours.removeprefix('ours')}",
                f"{contenders[ours]['share_of_gemm_peak']:.1%}".replace("%", " %"),
                f"{speed(contenders[peer]):.1f}, {peer}",
                f"{best['times_as_fast']:.2f}",
            ]
        )
    return ["model", "tokens", "type", "ours", "share of peak", "best peer", "ratio"], rows


def train_compiled() -> Table:
    rows = []
    for result in read("train_cpu_compiled")["results"]:
        for name, of in (("GPT-2's layers", "ours"), ("RMSNorm, SwiGLU, rotary positions", "ours, llama")):
            eager, compiled = (speed(result["contenders"][key]) for key in (of, f"{of}, compiled"))
            rows.append([name, result["type"], f"{eager:.1f}", f"{compiled:.1f}", f"{compiled / eager:.2f}"])
    return ["6 layers, hidden 384", "type", "eager", "compiled", "ratio"], rows


def adam_update() -> Table:
    rows = []
    for result in read("optimizer_cpu")["results"]:
        taken = result["milliseconds"]
        rows.append(
            [
                f"GPT-2 {result['size']}, {TYPES[result['type']]}",
                *(f"{taken[name]:.0f} ms" for name in ("plain", "compiled", "norm")),
                f"{result['times_as_fast']:.2f}",
            ]
        )
    for result in read("optimizer_cpu")["low_precision"]:
        taken = result["nanoseconds"]
        times = (f"{taken[name]:.1f} ns a parameter" for name in ("plain", "compiled"))
        rows.append([f"moments in {result['moments']}", *times, "", f"{result['times_as_fast']:.1f}"])
    return ["Adam's update", "torch's kernels", "one compiled kernel", "of it the norm", "times as fast"], rows


ENCODERS = {
    ("bert", "hugging face"): ("BERT-base, 512 tokens, 15 % hidden, order of two parts", "`BertForPreTraining`"),
    ("bert", "hugging face, hidden tokens"): ("the same", "with scores for hidden tokens only"),
    ("t5", "hugging face"): ("T5 v1.1 small, 512 and 114 tokens", "`T5ForConditionalGeneration`"),
}


def train_encoders() -> Table:
    rows = []
    for (model, name), (title, peer) in ENCODERS.items():
        contenders = read(f"train_cpu_{model}")["results"][0]["contenders"]
        ours, theirs = speed(contenders["ours"]), speed(contenders[name])
        rows.append([title, f"{ours:.1f}", f"{theirs:.1f}, {peer}", f"{ours / theirs:.2f}"])
    return ["model", "ours", "Hugging Face, eager", "ratio"], rows


# --- layouts --------------------------------------------------------------------------------------------

LAYOUTS = {
    "one process, two threads": "one process, two threads",
    "one process, one thread": "one process, one thread",
    "TP2": "tensor parallel 2",
    "TP2, sequence parallel": "the same with sequence parallel",
    "CP2": "context parallel 2",
    "DP2": "data parallel 2",
    "DP2, overlapped": "the same, overlapped",
    "PP2 1f1b": "pipeline 2, 1F1B",
    "PP2 gpipe": "pipeline 2, GPipe",
    "PP2 interleaved": "pipeline 2, interleaved",
    "PP2 zb-h1": "pipeline 2, ZB-H1",
}


def share(value: float, digits: int = 0) -> str:
    """In percent; nothing for what is below half a unit."""
    return f"{100 * value:.{digits}f} %" if 100 * value >= 0.5 else ""


def parallel() -> Table:
    rows = [
        [
            LAYOUTS[row["layout"]],
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_to_base']:.2f}",
            share(row["in_collectives"]),
            share(row["waiting_for_transfers"]),
        ]
        for row in read("parallel_cpu")["layouts"]
    ]
    return ["", "tokens/s", "beside one process with two threads", "collectives", "transfers"], rows


def bubbles() -> Table:
    rows = []
    for row in read("parallel_cpu_wide")["layouts"]:
        idle = row["bubble"]
        shares = [share(idle[name], 1) for name in ("even", "without transfers", "by clock")]
        ratio = f"{idle['without transfers to even']:.2f}"
        rows.append([LAYOUTS[row["layout"]].removeprefix("pipeline 2, "), *shares, ratio])
    return ["", "schedule", "measured", "by clock", "measured ÷ schedule"], rows


def overhead() -> Table:
    shares = read("overhead_cpu")["share_outside"]
    return (
        ["6 layers, hidden 384", "share of a step"],
        [["outside forward, backward and optimizer", f"{100 * statistics.median(shares):.2f} %"]],
    )


def attention_dropout() -> Table:
    chosen = (("512", "float32"), ("1024", "float32"), ("2048", "float32"), ("1024", "bfloat16"))
    found = {
        (str(row["sequence"]), row["type"], row["attention"]): f"{row['milliseconds']:.0f} ms, {row['kept']:.1f}"
        for row in read("attention_dropout_cpu")["rows"]
    }
    short = {"float32": "fp32", "bfloat16": "bf16"}
    rows = [
        [f"{length}, {short[kind]}", *(found[length, kind, name] for name in ("blocks", "sdpa", "unfused"))]
        for length, kind in chosen
    ]
    return ["sequence, type", "blocks (`auto`)", "torch's SDPA", "unfused"], rows


# --- data -----------------------------------------------------------------------------------------------

GPT2_ROWS = {
    "preprocess, tiktoken, 1 workers": "`preprocess_data.py`, one worker (tiktoken's engine)",
    "preprocess, tiktoken, 2 workers": "the same with two workers",
    "preprocess, gigatoken, 1 workers": "`preprocess_data.py --tokenizer-engine gigatoken`, one worker",
    "preprocess, gigatoken, 2 workers": "the same with two workers",
    "tiktoken, GPT-2's pattern alone": "tiktoken's engine alone, with GPT-2's pattern",
    "tiktoken, as used alone": "the same as it is used here",
    "gigatoken alone": "gigatoken alone",
    "gigatoken alone, read again": "the same text again, its words in the cache",
    "tokenizers encode_batch": "`tokenizers`, `encode_batch`",
    "BPE in Python, gpt3-tokenizer 0.1.5": "BPE in Python with a cache of words: the PyPI package gpt3-tokenizer",
    "BPE in Python, gpt3-tokenizer 0.1.5, read again": "the same text again",
    "BPE in Python, words to ids": "a leaner one whose cache holds ids",
    "BPE in Python, words to ids, read again": "the same text again",
}
SENTENCE_ROWS = {
    "preprocess, WordPiece by sentences": "`preprocess_data.py --split-sentences`, one worker",
    "NLTK Punkt, transformers' WordPiece in Python": "NLTK's Punkt and WordPiece in Python as in `transformers`",
    "NLTK Punkt, lean WordPiece in Python": "NLTK's Punkt and a leaner WordPiece in Python",
}


def text_per_cpu_second(title: str, names: dict[str, str]) -> Table:
    medians = read("tokenize_cpu")["medians"]
    return [title, "MB/CPU-s"], [[text, f"{medians[name]:.3g}"] for name, text in names.items()]


def workers() -> Table:
    rows = []
    for row in read("tokenize_cpu_scaling")["rows"]:
        one, two = row["1 workers"], row["2 workers"]
        walls = [f"{each['wall_s']:.1f} s" for each in (one, two)]
        parts = f"{two['parent_cpu_s']:.1f} s, 2 × {two['workers_cpu_s'] / 2:.1f} s"
        rows.append([row["engine"], *walls, f"{row['times_as_fast']:.2f}", parts, f"{row['spare_cores']:.1f}"])
    heads = [
        "engine",
        "one worker",
        "two",
        "times as fast",
        "CPU time of parent, workers",
        "a plain loop twice at once",
    ]
    return heads, rows


def data() -> Table:
    found = read("data_cpu")["results"]
    index, loader, cold = found["sample_index"], found["loader"], found["cold_start"]
    lengths = [index[f"sequence_length_{length}"] for length in (1024, 4096)]

    def both(kind: str) -> str:
        speeds = [loader[f"{kind}_sequence_length_{n}"]["tokens_per_cpu_second"] for n in (1024, 4096)]
        return ", ".join(f"{speed / 1e6:.0f} M" for speed in speeds)

    rows = [
        [
            "sample index, 10 M documents, 1 G tokens, against a C loop compiled on the spot; sequence 1024, 4096",
            "≤ 3× its CPU time",
            ", ".join(f"{each['times_c']:.1f}×" for each in lengths),
        ],
        ["its peak memory", "≤ 2× the result", ", ".join(f"{each['peak_over_result']:.2f}×" for each in lengths)],
        ["blending 10 M samples of 32 datasets", "≤ 3 s", f"{found['blend']['seconds']:.1f} s"],
        ["`GPTDataset` through the data loader, sequence 1024, 4096", "≥ 20 M tokens per CPU-second", both("one")],
        ["a blend", "≥ 20 M", both("blend")],
        [
            f"first batch of a new process, {cold['prefixes']} prefixes, warm caches, imports included; median of "
            f"{cold['rounds']} at load {cold['load']:.0f} on 2 cores",
            "≤ 5 s",
            f"{cold['wall_seconds']:.1f} s ({cold['least_wall_seconds']:.1f} s the fastest); "
            f"{cold['cpu_seconds']:.1f} s of CPU, {cold['cpu_seconds_of_imports']:.1f} s of it imports",
        ],
        [
            "index of BERT and T5, 4 M sentences, against a C loop",
            "none",
            f"{found['masked_sample_index']['seconds']:.1f} s of CPU, {found['masked_sample_index']['times_c']:.0f}×",
        ],
        [
            "share of a CPU training step spent in `batch-generator`",
            "≤ 1 %",
            f"{100 * found['training']['share']:.2f} %",
        ],
    ]
    return ["what", "asked", "measured"], rows


# --- evaluation -----------------------------------------------------------------------------------------

KINDS = {
    "choices": "four continuations of 2 to 40 tokens",
    "letters": "four continuations of one token",
    "words": "one continuation of 1 to 4 tokens",
    "rolling": "texts of 40 to 400 tokens, all predicted",
}


def lm_eval() -> Table:
    rows = []
    for kind, result in read("lm_eval_cpu")["kinds"].items():
        speeds = result["requests_per_cpu_second"]
        rows.append([KINDS[kind], f"{speeds['ours']:.1f}", f"{speeds['hf']:.1f}", f"{result['ratio']:.2f}"])
    return ["6 layers, hidden 384; each context has", "ours", "`hf`", "ratio"], rows


# --- one GPU --------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def gpu() -> Table:
    """Of `gpu.py`; rows without numbers say why."""
    rows = []
    found = read("gpu")["rows"] if (RESULTS / "gpu.json").exists() else {}
    for row in found.values():
        ours, title = row["ours"], row["title"]
        if "tokens_per_second" not in ours:
            rows.append([title, ours.get("said", ""), *[""] * 8])
            continue
        if row["peer"] in found and row["ratio"] is not None:
            title += f" ({row['ratio']:.2f} times {found[row['peer']]['title']})"
        shares = [percent(ours[name]) for name in ("mfu_causal_half", "mfu_causal_whole", "share_of_matmul_peak")]
        peers = []
        for name, ratio in (("plain", "ratio_to_plain"), ("transformers", "ratio_to_transformers")):
            peer, times = row.get(name, {}), row.get(ratio)
            peers.append(f"{peer['tokens_per_second']:.0f}" if "tokens_per_second" in peer else peer.get("said", ""))
            peers.append("" if times is None else f"{times:.2f}")
        memory = " / ".join(
            f"{one['peak_memory_gib']:.0f} GiB" for one in (ours, row.get("plain", {})) if "peak_memory_gib" in one
        )
        rows.append([title, f"{ours['tokens_per_second']:.0f}", *shares, *peers, memory])
    heads = [
        "model",
        "tokens/s",
        "MFU",
        "attention whole",
        "of a large product",
        "compiled plain torch",
        "ratio",
        "compiled transformers",
        "ratio",
        "memory / plain torch's",
    ]
    return heads, rows or [["not measured yet", *[""] * 9]]


ON_THE_TIMELINE = {
    "gradients": "reduce-scatter of gradients over the data parallel ranks",
    "weights": "all-gather of weights over the data parallel ranks",
    "tensor": "exchange of pieces over the tensor parallel ranks",
    "pipeline": "send, receive of activations, gradients of microbatch n",
    "experts": "all-to-all of tokens of experts",
}


def overlap() -> Table:
    """Of `overlap_cpu.py`."""
    rows = []
    for name, row in read("overlap_cpu")["rows"].items():
        plain, overlapped = (row["milliseconds"][way] for way in ("plain", "overlapped"))
        beside = {part: overlapped[f"beside {part}"] for part in ("forward", "backward", "optimizer")}
        total = sum(beside.values())
        shares = [f"{part} {seconds / total:.0%}".replace("%", " %") for part, seconds in beside.items() if seconds > 1]
        times = [f"{plain[key]:.0f} → {overlapped[key]:.0f} ms" for key in ("waiting", "step")]
        if "note" in row:
            times[1] = "not measured"
        flag = f"`{row['flag']}`" if row["flag"].startswith("--") else row["flag"]
        hidden = f"{row['hidden']:.0%}".replace("%", " %").replace("-", "−")
        rows.append([row["title"], flag, ON_THE_TIMELINE[name], ", ".join(shares), times[0], hidden, times[1]])
    return ["kind", "flag", "in flight, by name", "runs beside", "waiting", "hidden", "step"], rows


def moe() -> Table:
    """Of `moe_cpu.py`."""
    rows = []
    for row in read("moe_cpu")["rows"]:
        times, kept = row["milliseconds"], row["kept_mb"]
        names = ("ours, grouped", "ours, sequential", "ours, dense", "transformers, eager")
        ratios = (row[name] for name in ("times_faster", "dense_times_faster", "over_dense"))
        memory = " / ".join(f"{kept[name]:.0f}" for name in ("ours, grouped", "transformers, eager"))
        rows.append(
            [
                f"{row['hidden']}, {row['inner']}, {row['tokens']}",
                *(f"{times[name]:.0f} ms" for name in names),
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{memory} MiB",
            ]
        )
    heads = ["hidden, expert, tokens", "stacked", "one after the other", "dense block", "transformers, eager"]
    return [
        *heads,
        "times as fast",
        "dense block: times as fast",
        "over the dense block",
        "kept: stacked / theirs",
    ], rows


def regression_gate() -> Table:
    rows = []
    for row in read("gate")["rows"].values():
        speeds = [f"{1e3 * row['seconds'][name]:.0f} ms" for name in ("ours", "plain")]
        rows.append([row["title"], *speeds, f"{row['ratio']:.3f}"])
    return ["4 layers, hidden 256, 4 × 512 tokens", "ours", "plain torch", "accepted ratio"], rows


# --- fp8, memory of the loss -----------------------------------------------------------------------------

LAST = 3
"""Numbers of a curve, each the mean of ten steps, whose mean is the loss at the end."""


def at_the_end(found: dict[str, Any]) -> float:
    """Training loss of the last steps."""
    return statistics.mean(found["curve"][-LAST:])


def beside_bf16(runs: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Relative differences (training loss, validation loss), one a seed that bf16 has too."""
    mine, base = runs[name]["seeds"], runs["bf16"]["seeds"]
    both = [seed for seed in mine if seed in base]
    return (
        [at_the_end(mine[seed]) / at_the_end(base[seed]) - 1 for seed in both],
        [mine[seed]["validation"] / base[seed]["validation"] - 1 for seed in both],
    )


def fp8_text() -> Table:
    rows = []
    for setting, entry in read("fp8_text")["runs"].items():
        models = entry["models"]
        for name, found in models.items():
            seeds = found["seeds"].values()
            differences = beside_bf16(models, name)
            rows.append(
                [
                    setting,
                    name,
                    *(", ".join(f"{loss:.3f}" for loss in (at_the_end(seed) for seed in seeds)),),
                    ", ".join(signed_percent(one) for one in differences[0]) if name != "bf16" else "",
                    ", ".join(f"{seed['validation']:.3f}" for seed in seeds),
                    ", ".join(signed_percent(one) for one in differences[1]) if name != "bf16" else "",
                ]
            )
    return ["", "a number for each seed", "training loss", "beside bf16", "held out", "beside bf16"], rows


def signed_percent(difference: float) -> str:
    """With its sign."""
    return f"{100 * difference:+.2f} %"


def loss_memory() -> Table:
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read("loss_memory_cpu")["results"]:
        measured.setdefault((row["size"], row["type"]), {})[row["contender"]] = row
    rows = []
    for (_, kind), found in measured.items():
        contenders = [found[name] for name in ("ours", "ours, loss in pieces", "plain torch")]
        native, pieces, plain = (row["peak bytes"] for row in contenders)
        fast = [row["tokens_per_second"] for row in contenders]
        mib = [f"{value / 2**20:.0f} MiB" for value in (plain, native, pieces)]
        saved = [f"{100 * (1 - pieces / other):.0f} %" for other in (native, plain)]
        slower = ["" if other is None else f"{fast[1] / other:.2f}" for other in (fast[0], fast[2])]
        rows.append([TYPES[kind], *mib, *saved, *slower])
    heads = ["", "plain torch", "`native`", "`linear`", "saved beside `native`", "beside plain torch"]
    return [*heads, "speed beside `native`", "beside plain torch"], rows


# --- generation -----------------------------------------------------------------------------------------

LOADS = {
    "one": ("one prompt", 1.3),
    "equal": ("16 equal prompts", 1.5),
    "ragged": ("16 ragged prompts", 2.0),
    "arrivals": ("64 that arrive", 4.0),
}
"""Titles, and the ratios aimed at."""


def generation(name: str = "generate_cpu") -> Table:
    rows = []
    for number_type, of_type in read(name)["results"].items():
        bound = of_type["streaming"]["tokens_per_second"]
        for load, (title, aim) in LOADS.items():
            if load not in of_type:
                continue
            result = of_type[load]
            speeds, first = result["tokens_per_second"], result["median_seconds_to_first_token"]
            rows.append(
                [
                    title,
                    {"float32": "fp32", "bfloat16": "bf16"}[number_type],
                    f"{speeds['ours']:.1f}",
                    f"{speeds['transformers']:.1f}",
                    f"{result['ratio']:.2f}",
                    f"{aim:.1f}",
                    f"{bound:.1f}" if load == "one" else "",
                    f"{first['ours']:.2f}",
                    f"{first['transformers']:.2f}",
                    f"{result['equal_texts']:.0%}".replace("%", " %"),
                    str(len(result["all_rounds"]["ours"])),
                ]
            )
    heads = ["", "type", "ours", "transformers", "ratio", "aim", "bound", "ours, first token"]
    return [*heads, "transformers", "equal texts", "rounds"], rows


# --- pages ----------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], Table]] = {
    "train_gpt": train_gpt,
    "train_gpt_2threads": lambda: train_gpt("train_cpu_2threads"),
    "train_compiled": train_compiled,
    "adam_update": adam_update,
    "train_encoders": train_encoders,
    "parallel": parallel,
    "bubbles": bubbles,
    "overhead": overhead,
    "attention_dropout": attention_dropout,
    "tokenize_gpt2": lambda: text_per_cpu_second("GPT-2's vocabulary", GPT2_ROWS),
    "tokenize_sentences": lambda: text_per_cpu_second("WordPiece by sentences", SENTENCE_ROWS),
    "workers": workers,
    "data": data,
    "lm_eval": lm_eval,
    "gpu": gpu,
    "overlap": overlap,
    "generation": generation,
    "moe": moe,
    "regression_gate": regression_gate,
    "fp8_text": fp8_text,
    "loss_memory": loss_memory,
}


def markdown(table: Table) -> str:
    """Lines of a table."""
    heads, rows = table
    lines = [heads, *rows]
    head, *body = ["| " + " ".join(f"{cell} |".lstrip() for cell in line) for line in lines]
    return "\n".join([head, "|---" * len(heads) + "|", *body]) + "\n"


def rendered(page: str) -> str:
    """`page` with its tables as the results have them.

    Raises:
        KeyError: it asks for a table that nobody makes.
    """
    return BLOCK.sub(lambda found: found[1] + markdown(TABLES[found[2]]()) + found[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with status 1 if a page would change")
    args = parser.parse_args()
    changed = []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            changed.append(path)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    for path in changed:
        print(f"{path.relative_to(ROOT)} {'is not as the results say' if args.check else 'written'}")
    sys.exit(bool(changed) and args.check)


if __name__ == "__main__":
    main()
