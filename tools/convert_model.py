"""Turns a GGUF file into a bfloat16 safetensors folder that SGLang can load.

Run by ``tools/environment`` with the Python of the environment::

    python tools/convert_model.py FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def forget_quantization(model: PreTrainedModel) -> None:
    """Make the model an ordinary one: its weights are dequantized by now, and GGUF cannot be saved again."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def keep_first_token(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Let the tokenizer begin every text with its BOS token if the file says so, which transformers does not read."""
    field = GGUFReader(source).get_field("tokenizer.ggml.add_bos_token")
    if field is not None and field.contents():
        first = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.bos_token_id)]
        )


def convert(source: Path, target: Path) -> None:
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    say(f"reading the tokenizer of {source.name}")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    keep_first_token(tokenizer, source)
    say("dequantizing the weights to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    forget_quantization(model)
    say("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    say("the model is converted")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: convert_model.py FILE.gguf FOLDER", file=sys.stderr)
        return 2
    convert(Path(arguments[0]), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
