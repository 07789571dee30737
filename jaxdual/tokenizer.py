"""Text to token ids and back, and chat messages to prompt text, from a model folder in Hugging Face layout.

Read are `tokenizer.json` (required), `tokenizer_config.json` and `special_tokens_map.json` (special tokens), and the
chat template: `chat_template.jinja`, else `chat_template.json`, else the `chat_template` entry of
`tokenizer_config.json` (one text, or a list of named ones).
"""

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer file, chat template or text that cannot be used; the message names the file or the reason."""


class Tokenizer:
    """A model's tokenizer and chat template; safe to use from several threads."""

    def __init__(
        self,
        plain: tokenizers.Tokenizer,
        text_only: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, jinja2.Template],
        source: Path,
    ) -> None:
        """Args are two equal tokenizers, of which the second reads special tokens as ordinary text; see `from_dir`."""
        self._plain = plain
        self._text_only = text_only
        self._special_tokens = dict(special_tokens)
        self._templates = dict(templates)
        self._source = source
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(plain.to_str())["decoder"])

    @classmethod
    def find(cls, path: str | Path) -> "Tokenizer | None":
        """The tokenizer of a model folder, None if it holds none at all; raises as `from_dir`."""
        return cls.from_dir(path) if (Path(path) / "tokenizer.json").is_file() else None

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a model folder.

        Raises:
            TokenizerError: a file is missing, malformed or holds a value of the wrong type; the message names it.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        text = _read_text(file)
        try:
            plain, text_only = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"{file}: not a usable tokenizer: {error}") from None
        for instance in (plain, text_only):
            # A length limit stored in the file must not cut prompts silently.
            instance.no_truncation()
            instance.no_padding()
        text_only.encode_special_tokens = True
        special_tokens = _read_special_tokens(folder)
        for name in ("bos_token", "eos_token"):
            token = special_tokens.get(name)
            if token is not None and plain.token_to_id(token) is None:
                raise TokenizerError(f"{folder}: {name} {token!r} is not in the vocabulary of tokenizer.json")
        return cls(plain, text_only, special_tokens, _read_templates(folder), folder)

    def encode(self, text: str, add_special_tokens: bool = True, special_tokens_as_text: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: the text.
            add_special_tokens: add what the tokenizer puts around a text (for example a beginning-of-sequence token).
            special_tokens_as_text: read the spelling of a special token as ordinary characters, as is wanted for
                untrusted text.

        Raises:
            TokenizerError: the text is not valid Unicode (a lone surrogate).
        """
        tokenizer = self._text_only if special_tokens_as_text else self._plain
        _check_unicode(text)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and of each the first character and the one behind its last.

        What is put around a text has (0, 0). Raises as `encode`.
        """
        _check_unicode(text)
        encoding = self._plain.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        /,  # so that a template variable may have any name but the arguments'
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **template_vars: Any,
    ) -> str | list[int]:
        """The prompt of a chat.

        Args:
            messages: mappings with `role`, `content` and what else the template reads.
            add_generation_prompt: end with the opening of the assistant's turn.
            tokenize: give token ids in place of text.
            template_vars: further variables of the template; `tools` among them selects a template named `tool_use`
                where there is one.

        Raises:
            TokenizerError: the folder has no chat template, or the template rejects the messages.
        """
        if not self._templates:
            raise TokenizerError(
                f"{self._source}: the model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json)"
            )
        tools = template_vars.pop("tools", None)
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TokenizerError(f"{self._source}: no chat template named 'default', only {sorted(self._templates)}")
        variables = {"documents": None, **self._special_tokens, **template_vars}
        try:
            rendered = self._templates[name].render(
                variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of its own and may fail in any way
            raise TokenizerError(f"the chat template cannot render these messages: {error}") from None
        return self.encode(rendered, add_special_tokens=False) if tokenize else rendered

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return bool(self._templates)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same tokens of every text, in hexadecimal digits."""
        return hashlib.blake2b(self._plain.to_str().encode(), digest_size=16).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may be padded to more."""
        size: int = self._plain.get_vocab_size(with_added_tokens=True)
        return size

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token's spelling in the vocabulary."""
        return max(map(len, self._plain.get_vocab(with_added_tokens=True)), default=1)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, None where the folder names none."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, None where the folder names none."""
        return self._special_id("bos_token")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens: those that `skip_special_tokens` leaves out."""
        return frozenset(id for id, token in self._plain.get_added_tokens_decoder().items() if token.special)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (not its text), None for an id outside the vocabulary."""
        token: str | None = self._plain.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; a token may hold a part of a character."""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._plain.get_added_tokens_decoder():
            return token.encode()
        if self._byte_level:
            return bytes(_byte_of_character()[c] for c in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Between other tokens, so that a decoder which strips the first space of a text keeps this token's own.
        pair: str = self._plain.decode([token_id, token_id], skip_special_tokens=False)
        single: str = self._plain.decode([token_id], skip_special_tokens=False)
        return pair[len(single) :].encode()

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._plain.token_to_id(token)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from None


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (the table of GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TokenizerError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file}: cannot be read: {error}") from None


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; an absent file is an empty object."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens; tokenizer_config.json goes before special_tokens_map.json."""
    found: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        entries = _read_object(file)
        for name in _SPECIAL_NAMES:
            entry = entries.get(name)
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str):
                found[name] = token
            elif entry is not None:
                raise TokenizerError(f"{file}: {name} must be a string or an object with 'content', found {entry!r}")
    return found


def _read_templates(folder: Path) -> dict[str, jinja2.Template]:
    """Compiled chat templates by name; the usual single one is 'default'."""
    file = folder / "chat_template.jinja"
    if file.exists():
        sources: Any = _read_text(file)
    else:
        for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            sources = _read_object(file).get("chat_template")
            if sources is not None:
                break
    if sources is None:
        return {}
    if isinstance(sources, str):
        sources = [{"name": "default", "template": sources}]
    elif isinstance(sources, dict):
        sources = [{"name": name, "template": template} for name, template in sources.items()]
    compiled = {}
    environment = _template_environment()
    for entry in sources if isinstance(sources, list) else [sources]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise TokenizerError(
                f"{file}: chat_template must be a string or a list of objects with 'name' and 'template'"
            )
        try:
            compiled[name] = environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"{file}: chat template {name!r}, line {error.lineno}: {error.message}") from None
    return compiled


def _template_environment() -> ImmutableSandboxedEnvironment:
    """The environment that published chat templates are written for (that of transformers)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which is not what models were trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
