import json
import shutil
from pathlib import Path

import pytest

from jaxdual.tokenizer import Tokenizer, TokenizerError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizer"
CASES = json.loads((FIXTURE / "cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(FIXTURE)


@pytest.fixture
def folder(tmp_path):
    """A model folder that a test may damage; without a chat template of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(FIXTURE / name, tmp_path / name)
    return tmp_path


def write_config(folder, **changes):
    config = json.loads((FIXTURE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("case", CASES["strings"], ids=lambda case: repr(case["text"])[:24])
def test_recorded_strings(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
    assert tokenizer.encode(case["text"], special_tokens_as_text=True) == case["ids_specials_as_text"]


@pytest.mark.parametrize("case", CASES["chats"], ids=lambda case: case["rendered"][-24:])
def test_recorded_chats(tokenizer, case):
    variables = {"enable_thinking": case["enable_thinking"]} if "enable_thinking" in case else {}
    generation = case["add_generation_prompt"]
    assert tokenizer.apply_chat_template(case["messages"], generation, **variables) == case["rendered"]
    assert tokenizer.apply_chat_template(case["messages"], generation, tokenize=True, **variables) == case["ids"]


def test_vocabulary_facts(tokenizer):
    assert tokenizer.vocab_size == CASES["vocab_size"]
    assert tokenizer.special_ids == set(CASES["special_ids"].values())
    assert tokenizer.eos_token_id == 2047
    assert tokenizer.bos_token_id is None
    assert tokenizer.id_to_token(2046) == "<|im_start|>"
    assert tokenizer.id_to_token(10**6) is None
    assert tokenizer.decode([10**6]) == ""


def test_token_bytes_join_to_the_text(tokenizer):
    text = "def f():\n\treturn '日本 é 🙂'<|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_lone_surrogate_is_an_error(tokenizer):
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_stored_truncation_does_not_cut_prompts(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_dir(folder).encode("Hello, world!")) == 8


def test_missing_tokenizer_is_told_apart(tmp_path):
    assert Tokenizer.find(tmp_path) is None
    assert Tokenizer.find(FIXTURE) is not None
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"version": "1.0", "model": 3}'])
def test_malformed_tokenizer_json_names_the_file(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a usable tokenizer"):
        Tokenizer.from_dir(folder)


def test_binary_tokenizer_json_names_the_file(folder):
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer_config\.json: not valid JSON"),
        ("[1]", r"tokenizer_config\.json: expected a JSON object, found list"),
        ('{"eos_token": 3}', r"tokenizer_config\.json: eos_token must be a string .* found 3"),
        ('{"eos_token": "<nope>"}', r"eos_token '<nope>' is not in the vocabulary"),
        ('{"chat_template": 3}', r"tokenizer_config\.json: chat_template must be a string or a list"),
        ('{"chat_template": [{"name": "default"}]}', r"chat_template must be a string or a list"),
        ('{"chat_template": "a\\n{% if %}"}', r"tokenizer_config\.json: chat template 'default', line 2: "),
    ],
)
def test_malformed_tokenizer_config_names_file_and_key(folder, content, message):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(folder)


def test_no_chat_template_is_an_error_only_for_chats(folder):
    tokenizer = Tokenizer.from_dir(folder)
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("Hello, world!")
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_template_error_carries_the_template_s_message(tokenizer):
    with pytest.raises(TokenizerError, match="unexpected role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}])
    with pytest.raises(TokenizerError, match="cannot render"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}])


MESSAGES = [{"role": "user", "content": "<a & 'b'>"}]


def test_template_sources_in_order_of_precedence(folder):
    write_config(folder, chat_template="config")
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == "config"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == "jinja"


def test_named_templates_and_tools(folder):
    write_config(
        folder,
        chat_template=[
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools[0].name }}"},
        ],
    )
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"name": "search"}]) == "search"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<a & \'b\'>"}'),
        ("{{ eos_token }}{{ bos_token is defined }}", "<|im_end|>False"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}text{% endgeneration %}!", "text!"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("  {% if true %}\nline\n  {% endif %}\n", "line\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_template_environment(folder, template, rendered):
    (folder / "chat_template.jinja").write_text(template)
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES) == rendered


def test_template_variables_may_have_any_name(folder):
    (folder / "chat_template.jinja").write_text("{{ self_ }}{{ name }}")
    assert Tokenizer.from_dir(folder).apply_chat_template(MESSAGES, **{"self": 0, "name": 1, "self_": 2}) == "21"


def test_template_runs_in_a_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(TokenizerError, match="unsafe"):
        Tokenizer.from_dir(folder).apply_chat_template(list(MESSAGES))
