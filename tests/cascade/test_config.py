"""Cascades from TOML files, letters from tokenizers, and options of requests."""

from pathlib import Path

import pytest

from jaxdual.cascade.config import CascadeConfig, ExternalTier, Prices, read_cascade
from jaxdual.cascade.gate import Fusion, Gate, Platt
from jaxdual.cascade.letters import confidence_of
from jaxdual.cascade.options import CascadeOptions, CascadeRequestError, ConfidenceSpec, options_from_json
from jaxdual.config import ConfigError, EngineConfig
from jaxdual.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tokenizer"
SMALL = '[[tier]]\nname = "small"\nmodel = "a"\n'
LARGE = '[[tier]]\nname = "large"\nmodel = "b"\n'
REMOTE = '[[tier]]\nname = "remote"\nurl = "http://127.0.0.1:9000/v1"\nmodel = "gpt-4o"\n'


def read(folder, text, engine=None):
    file = folder / "cascade.toml"
    file.write_text(text)
    return read_cascade(file, engine)


def test_every_key_arrives(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a.probe").touch()
    text = (
        'name = "best"\nmax_hops = 2\nskip_if_pik_below = 0.1\n'
        '[confidence]\nletters = ["1", "2"]\nmode = "choices"\n'
        + SMALL
        + 'probe = "a.probe"\ntau_ik = 0.25\ntau_t = 0.75\nplatt_ik = [1.2, -0.1]\nplatt_t = [2, 0]\n'
        "temperature = 1.5\n"
        "memory_fraction = 0.25\nprice_in = 0.08\nprice_out = 0.16\n[tier.engine]\nmax_num_seqs = 16\n"
        '[[tier]]\nname = "middle"\nmodel = "org/b"\nprobe = "elsewhere"\n'
        "fusion = {p_t = 1, p_ik = 2, intercept = 0.5, tau = 0.8}\n"
        + REMOTE
        + 'api_key_env = "KEY"\nconnect_timeout = 1\ntimeout = 2\nparameters = 70e9\nprice_in = 2.5\n'
    )
    config = read(tmp_path, text, EngineConfig(max_num_seqs=8, block_size=16))
    small, middle, remote = config.tiers
    assert (config.name, config.max_hops, config.skip_if_pik_below) == ("best", 2, 0.1)
    assert config.confidence == ConfidenceSpec(letters=("1", "2"), mode="choices")
    assert small.engine == EngineConfig(
        model=str(tmp_path / "a"),
        served_model_name="small",
        probe=str(tmp_path / "a.probe"),
        max_num_seqs=16,
        block_size=16,
    )
    assert (small.memory_fraction, small.prices) == (0.25, Prices(input=0.08, output=0.16))
    letters = confidence_of(config.confidence, Tokenizer.from_dir(TOKENIZER), "small", small.temperature)
    assert letters.temperature == 1.5
    assert small.gate(letters) == Gate(letters, 0.25, 0.75, Platt(1.2, -0.1), Platt(2.0, 0.0))
    # What is not in the file's folder may be a hub name; what tiers don't say, all have.
    assert (middle.engine.model, middle.engine.probe, middle.engine.max_num_seqs) == ("org/b", "elsewhere", 8)
    assert middle.fusion == Fusion(1, 2, 0.5, 0.8)
    assert middle.memory_fraction == pytest.approx(0.65)
    assert remote == ExternalTier(
        name="remote",
        url="http://127.0.0.1:9000/v1",
        model="gpt-4o",
        api_key_env="KEY",
        connect_timeout=1,
        timeout=2,
        parameters=70 * 10**9,
        prices=Prices(input=2.5),
    )


def test_what_is_left_out_has_the_paper_s_values(tmp_path):
    config = read(tmp_path, SMALL + LARGE)
    small, large = config.tiers
    assert (config.name, config.max_hops, config.confidence) == ("auto", None, ConfidenceSpec())
    assert (small.tau_ik, small.tau_t, small.has_probe, small.prices) == (0.5, 0.9, False, None)
    assert small.memory_fraction == large.memory_fraction == pytest.approx(0.45)
    assert (config.local, config.gated) == ((small, large), (small,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[\[tier\]\] is missing"),
        ("tau = 1\n" + LARGE, "unknown key 'tau'; known are name, max_hops"),
        (SMALL + "tau = 1\n" + LARGE, "tier 'small': unknown key 'tau'; known are name, model, probe"),
        (REMOTE + "tau_t = 0.9\n", "tier 'remote': unknown key 'tau_t'"),
        (SMALL + "tau_t = 1.1\n" + LARGE, r"tier 'small': tau_t=1.1 must be in \[0, 1\]"),
        (SMALL + "tau_t = true\n" + LARGE, "tau_t=True must be a number"),
        (SMALL + "tau_ik = 0.5\n" + LARGE, "tau_ik=0.5 needs a probe"),
        (SMALL + LARGE + "tau_t = 0.9\n", "tier 'large': tau_t=0.9: the last tier answers"),
        (SMALL + LARGE + 'probe = "x"\n', "tier 'large': probe='x': the last tier answers"),
        (SMALL + "platt_t = [1]\n" + LARGE, r"platt_t=\[1\] must be \[slope, intercept\]"),
        (SMALL + 'probe = "x"\nfusion = {p_t = 1}\n' + LARGE, "fusion=.* must have p_t, p_ik, intercept, tau"),
        (
            SMALL + 'probe = "x"\ntau_t = 0.5\nfusion = {p_t = 1, p_ik = 1, intercept = 0, tau = 0.5}\n' + LARGE,
            "tau_t=0.5 has no use",
        ),
        (SMALL + "temperature = 0\n" + LARGE, "temperature=0 must be above 0"),
        (
            SMALL + "memory_fraction = 0.7\n" + LARGE + "memory_fraction = 0.5\n",
            "is 1.2; it must be at most 1",
        ),
        (SMALL + "memory_fraction = 0.95\n" + LARGE, "the others have no room"),
        (SMALL + "memory_fraction = 0\n" + LARGE, r"memory_fraction=0 must be in \(0, 1\]"),
        (SMALL + SMALL, "name='small' of a tier must be one that no other tier has"),
        ('name = "small"\n' + SMALL, "nor the cascade"),
        (REMOTE, "at least one .* with a model of its own"),
        (REMOTE + LARGE, "tier 'remote': only the last tier may have a url"),
        (SMALL + REMOTE.replace("http://", ""), "url='127.0.0.1:9000/v1' must be"),
        (SMALL + REMOTE.replace("9000", "port"), "url='http://127.0.0.1:port/v1' must be"),
        (SMALL + REMOTE.replace("9000", "99999"), "url='http://127.0.0.1:99999/v1' must be"),
        (SMALL + REMOTE.replace("127.0.0.1:9000", "[::1"), "url='http://.::1/v1' must be"),
        (SMALL + "engine = 3\n" + LARGE, r"tier 'small': engine=3 must be a table, \[tier.engine\]"),
        (SMALL + "price_in = -1\n" + LARGE, "price_in=-1.0 must be at least 0"),
        (SMALL + '[tier.engine]\nmodel = "c"\n' + LARGE, "model is the tier's own key 'model'"),
        (SMALL + '[tier.engine]\nprobe = "c"\n' + LARGE, "probe is the tier's own key 'probe'"),
        (SMALL + "[tier.engine]\nseqs = 1\n" + LARGE, "tier 'small': unknown setting 'seqs'"),
        (SMALL + "[tier.engine]\nmax_num_seqs = 0\n" + LARGE, "tier 'small': max_num_seqs=0 must be at least 1"),
        ("max_hops = -1\n" + LARGE, "max_hops=-1 must be a whole number of at least 0"),
        ("skip_if_pik_below = 2\n" + LARGE, r"skip_if_pik_below=2 must be in \[0, 1\]"),
        ("skip_if_pik_below = 0.6\n" + SMALL + 'probe = "x"\n' + LARGE, "at most tau_ik=0.5 of tier 'small'"),
        ('[confidence]\nkind = "words"\n' + LARGE, "kind='words' must be 'choices' or 'opening'"),
        ('[confidence]\nkind = "opening"\nletters = ["A", "B"]\n' + LARGE, "letters=.* has no use"),
        ('[confidence]\nletters = ["A"]\n' + LARGE, r"letters=\['A'\] must be a list of 2 to 32"),
        ('[confidence]\nmode = "half"\n' + LARGE, "mode='half' must be one of full, choices"),
        ("[[tier]]\nname = 3\n", "tier 3: name=3 must be a text|model is missing"),
        ("nothing", "not a TOML file"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'cascade.toml'}: ")


def test_settings_of_one_model_contradict_a_cascade(tmp_path):
    for setting in ("model", "served_model_name", "probe"):
        with pytest.raises(ConfigError, match=f"{setting}='x' contradicts the cascade"):
            read(tmp_path, LARGE, EngineConfig(**{setting: "x"}))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_cascade(tmp_path / "none.toml")


def test_a_cascade_without_tiers_is_none():
    with pytest.raises(ConfigError, match="at least one"):
        CascadeConfig(tiers=())


# Letters.


class Words:
    """A tokenizer of whole words: those it knows are one token, others one a character."""

    def __init__(self, *words):
        self.ids = {word: number for number, word in enumerate(words)}

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [self.ids[text]] if text in self.ids else [100 + ord(char) for char in text]


def test_a_letter_is_what_is_one_token_with_and_without_a_blank():
    confidence = confidence_of(ConfidenceSpec(letters=("A", "B")), Words("A", " A", "B"), "small")
    assert (confidence.kind, confidence.tokens, confidence.mode) == ("choices", ((0, 1), (2,)), "full")


def test_a_letter_that_is_no_token_is_an_error_of_its_tier():
    with pytest.raises(ValueError, match="tier 'small': the letter 'yes' is no single token"):
        confidence_of(ConfidenceSpec(letters=("A", "yes")), Words("A"), "small")


def test_letters_that_are_one_token_are_an_error():
    class Folding(Words):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text.lower(), add_special_tokens)

    with pytest.raises(ValueError, match="tier 't': 'a' and 'A' are the same token, 0"):
        confidence_of(ConfidenceSpec(letters=("a", "A")), Folding("a"), "t")


def test_the_temperature_is_that_of_the_letters_own_distribution():
    for mode, expected in (("full", 1.0), ("choices", 2.0)):
        spec = ConfidenceSpec(letters=("A", "B"), mode=mode)
        assert confidence_of(spec, Words("A", "B"), "t", 2.0).temperature == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("Yes", " Yes"), ((0, 1),)),
        (("Yes",), ((0,),)),
        ((), ((100 + ord("Y"),), (100 + ord("e"),), (100 + ord("s"),))),
    ],
)
def test_an_opening_is_the_tokens_of_its_text(words, expected):
    confidence = confidence_of(ConfidenceSpec(kind="opening", opening="Yes"), Words(*words), "t")
    assert (confidence.kind, confidence.tokens) == ("opening", expected)


# Options.


def test_options_take_the_place_of_the_default():
    default = ConfidenceSpec(letters=("X", "Y"))
    assert options_from_json({}).confidence(default) is default
    assert options_from_json({"letters": ["A", "B"], "mode": "choices"}).confidence(default) == ConfidenceSpec(
        letters=("A", "B"), mode="choices"
    )
    assert options_from_json({"mode": "choices"}).confidence(default).letters == ("X", "Y")
    assert options_from_json({"opening": "Answer"}).confidence(default).kind == "opening"
    assert options_from_json({"max_hops": 0}) == CascadeOptions(max_hops=0)
    with pytest.raises(CascadeRequestError, match="mode needs letters"):
        options_from_json({"mode": "full"}).confidence(ConfidenceSpec(kind="opening"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "cascade=3 must be an object with letters, opening, mode, max_hops"),
        ({"letter": ["A"]}, "unknown field 'letter'; known are letters"),
        ({"letters": "AB"}, "letters='AB' must be a list"),
        ({"letters": ["A"]}, "must be a list of 2 to 32"),
        ({"letters": ["A", "A"]}, "different"),
        ({"letters": ["A", " B"]}, "without blanks"),
        ({"letters": ["A", 3]}, "letters: 3 is none"),
        ({"opening": " "}, "opening=' ' must be a text"),
        ({"opening": 7}, "opening=7 must be a text"),
        ({"mode": "half"}, "mode='half' must be one of full, choices"),
        ({"mode": ["full"]}, "must be one of full, choices"),
        ({"max_hops": -1}, "max_hops=-1 must be a whole number"),
        ({"max_hops": True}, "max_hops=True must be"),
        ({"opening": "Answer", "letters": ["A", "B"]}, "opening excludes letters"),
    ],
)
def test_options_that_can_not_be_are_refused(value, message):
    with pytest.raises(CascadeRequestError, match=message):
        options_from_json(value)
