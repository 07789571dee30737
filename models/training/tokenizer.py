"""The byte-level BPE tokenizer that all shipped models share, and its chat template.

No normaliser: source code must come back byte for byte, and NFC would change it. Text is split first by the regular
expression that Qwen and GPT-4 style tokenizers use; in Python source it leaves the indentation of a line but for its
last space as one piece (``"       "`` + ``" return"``), and every digit alone.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.training import corpus

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
MAX_LENGTH = 1024
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. Roles are checked so that a misspelt one is an error and not a turn the model has never seen.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unexpected role: ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains byte-level BPE with ``vocab_size`` entries, the special tokens being the last ids.

    Raises:
        ValueError: ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: must be at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int = MAX_LENGTH) -> None:
    """Writes the files of a Hugging Face tokenizer (`FILES`) into ``folder``, for a model of so many positions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "content": "",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    names = {"additional_special_tokens": [IM_START, IM_END], "eos_token": IM_END, "pad_token": END_OF_TEXT}
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {**special, "content": token} for token in SPECIAL_TOKENS
        },
        **names,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """Reads ``tokenizer.json`` of a model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def render_chat(messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Renders messages (``role``, ``content``) with `CHAT_TEMPLATE`, in the environment chat templates expect."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    template = environment.from_string(CHAT_TEMPLATE, globals={"raise_exception": raise_exception})
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train the tokenizer on the training split and write its files."""
    parser = argparse.ArgumentParser(prog="python -m models.training.tokenizer", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the tokenizer files to")
    parser.add_argument("--allow-changed", action="store_true", help="train on corpus files that differ from the list")
    args = parser.parse_args(argv)
    try:
        texts = corpus.read_texts("train", allow_changed=args.allow_changed)
    except corpus.CorpusChangedError as error:
        print(error, file=sys.stderr)
        return 2
    tokenizer = train(texts.values())
    save(tokenizer, args.out)
    size = sum(len(text.encode()) for text in texts.values())
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts.values())
    print(f"{tokenizer.get_vocab_size()} entries; {size / tokens:.2f} bytes per token over the training split")
    return 0


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
