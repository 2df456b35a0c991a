r"""Writes a dataset for SGLang's bench_serving: prompts over the same passages in different orders, with questions.

Its source is conversations in ShareGPT's format (assistants' messages become passages, the first messages of people
become questions), or a folder of .txt and .md files, which are cut into passages:

    python examples/sharegpt_to_bench.py conversations.json shuffled.jsonl --prompts 64
    python examples/sharegpt_to_bench.py folder/ shuffled.jsonl --prompts 64 --passages 12

With a3, and with a full prefill of the same prompts:

    python -m sglang.bench_serving --backend sglang --base-url http://127.0.0.1:30000 --model MODEL \
        --dataset-name custom --dataset-path shuffled.jsonl --num-prompts 64 --max-concurrency 4 --flush-cache
    python -m sglang.bench_serving --backend sglang --base-url http://127.0.0.1:30000 --model MODEL \
        --dataset-name custom --dataset-path shuffled.jsonl --num-prompts 64 --max-concurrency 4 --flush-cache \
        --header x-a3=false
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

ANSWER = "The passages say so in one place, and nothing in the others contradicts them."
"""Answer in the dataset; its length is the output length, unless --sharegpt-output-len overrides that."""
QUESTIONS = ("What are these passages about?", "Which names are mentioned?", "What happened first?", "Sum them up.")


def from_conversations(file: Path) -> tuple[list[str], list[str]]:
    """The assistants' messages, and the first question of each conversation."""
    said, asked = [], []
    for conversation in json.loads(file.read_text(encoding="utf-8")):
        turns = conversation.get("conversations", [])
        said += [turn["value"].strip() for turn in turns if turn["from"] in ("gpt", "assistant")]
        asked += [turn["value"].strip() for turn in turns[:1] if turn["from"] in ("human", "user")]
    return said, asked


def from_folder(folder: Path, words: int) -> list[str]:
    """The files' paragraphs, joined into passages of at least ``words`` words."""
    passages: list[str] = []
    for file in sorted(one for one in folder.rglob("*") if one.suffix in (".txt", ".md")):
        joined = ""
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            joined = f"{joined}\n{paragraph.strip()}".strip()
            if len(joined.split()) >= words:
                passages.append(joined)
                joined = ""
        passages += [joined] if joined else []
    return passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="ShareGPT's JSON, or a folder of texts")
    parser.add_argument("output", type=Path, help="JSON Lines for --dataset-name custom")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--passages", type=int, default=8, help="per prompt")
    parser.add_argument("--corpus", type=int, default=24, help="passages that the prompts are drawn from")
    parser.add_argument("--words", type=int, default=120, help="least words of a passage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chooser = random.Random(args.seed)
    if args.source.is_dir():
        passages, questions = from_folder(args.source, args.words), list(QUESTIONS)
    else:
        passages, questions = from_conversations(args.source)
    # People's first messages may contain long texts, so only short ones are used as questions.
    questions = [one for one in questions if len(one.split()) <= 60] or list(QUESTIONS)
    corpus = [one for one in dict.fromkeys(passages) if len(one.split()) >= args.words]
    chooser.shuffle(corpus)
    corpus = corpus[: args.corpus]
    if len(corpus) < args.passages:
        parser.error(f"{args.source} has {len(corpus)} passages of {args.words} words, a prompt takes {args.passages}")
    with args.output.open("w", encoding="utf-8") as lines:
        for number in range(args.prompts):
            chosen = chooser.sample(corpus, args.passages)
            # With a blank line after it, a passage has the same tokens at any position.
            prompt = "\n\n".join([*chosen, f"Question {number + 1}: {chooser.choice(questions)}"])
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": ANSWER}]
            lines.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
    print(f"{args.prompts} prompts over {len(corpus)} passages, {args.passages} in each, in {args.output}")


if __name__ == "__main__":
    main()
