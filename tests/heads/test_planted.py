"""Heads set by hand: one that copies key matches, and a blunt one that writes what it looks at into the logits.

Detection finds the first; decoding by it has the second look at the key that answers, by the factor of the closed form.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from jaxdual import LLM, DyscoParams, SamplingParams
from jaxdual.heads import ItemPrompts, detect
from models import ModelConfig, RopeConfig

KEYS, ASKERS = range(8), range(8, 16)  # an asker looks for the key whose number is less by 8
FILLERS, NOTHING = (16, 17, 18), 19
VOCAB, HIDDEN, HEAD_DIM, HEADS, KV_HEADS = 20, 32, 64, 4, 2
SHARP, BLUNT = (0, 2), (1, 1)
GAIN = 50.0  # what the blunt head writes, by what it looks at

CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=8,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-9,
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=256,
    tie_word_embeddings=False,
    eos_token_ids=(NOTHING,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. A token is a unit vector of length `sqrt(hidden)`, which normalising leaves as it is, and nothing
    but the blunt head, which is in the last layer, writes into it: the mass of each token goes to the coordinate of
    that token, and from there to its logit."""
    path = tmp_path_factory.mktemp("planted")
    models.save(models.init(CONFIG), path, dtype="float32")
    file, rng = path / "model.safetensors", np.random.default_rng(0)
    tensors = {name: np.zeros_like(value) for name, value in load_file(file).items()}
    one_hot = np.eye(HIDDEN, dtype=np.float32)[:VOCAB]
    for name, value in tensors.items():
        if "norm" in name:
            value[:] = 1
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            value[:] = 0.05 * rng.standard_normal(value.shape)
    tensors["model.embed_tokens.weight"][:] = np.sqrt(HIDDEN) * one_hot
    tensors["lm_head.weight"][:] = one_hot
    of_kv, of_head = (slice(HEAD_DIM * head, HEAD_DIM * head + HEAD_DIM) for head in (SHARP[1] // 2, SHARP[1]))
    slow = [*range(16, 32), *range(48, 64)]  # dimensions that hardly turn within a prompt
    matched = np.zeros((HEAD_DIM, HIDDEN), np.float32)
    matched[slow] = np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0]
    queries = np.zeros_like(matched)
    queries[:, ASKERS] = 4 * matched[:, KEYS]
    tensors[f"model.layers.{SHARP[0]}.self_attn.k_proj.weight"][of_kv] = matched
    tensors[f"model.layers.{SHARP[0]}.self_attn.q_proj.weight"][of_head] = queries
    values = tensors[f"model.layers.{BLUNT[0]}.self_attn.v_proj.weight"]
    values[HEAD_DIM * (BLUNT[1] // 2) :][:VOCAB, :VOCAB] = np.eye(VOCAB) / np.sqrt(HIDDEN)
    written = tensors[f"model.layers.{BLUNT[0]}.self_attn.o_proj.weight"]
    written[:VOCAB, HEAD_DIM * BLUNT[1] :][:, :VOCAB] = GAIN * np.eye(VOCAB)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def item(seed: int) -> ItemPrompts:
    """Eight documents, each with a key, and a question for one of them."""
    rng = np.random.default_rng(seed)
    tokens, documents, order = [NOTHING], [], rng.permutation(KEYS)
    for key in order:
        document = rng.choice(FILLERS, 5)
        document[rng.integers(5)] = key
        documents.append((len(tokens), len(tokens) + 5))
        tokens += document.tolist()
    gold = int(rng.integers(8))
    query, null = [FILLERS[0], int(order[gold]) + 8], [FILLERS[0], NOTHING]
    return ItemPrompts(str(seed), tokens + query, tokens + null, len(tokens), len(tokens), tuple(documents), (gold,))


def masses(llm: LLM, prompt: list[int], dysco: DyscoParams | None) -> tuple[np.ndarray, list[int]]:
    """What the blunt head's query of the last token gives each token of the vocabulary, and what was selected."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=VOCAB, dysco=dysco)
    (request,) = llm.generate([{"prompt_token_ids": prompt}], params)
    (output,) = request.outputs
    assert output.logprobs is not None
    scores = np.array([output.logprobs[0][token].logprob for token in range(VOCAB)], np.float64)
    # A logit is the token's coordinate by a factor; a token that is not in the prompt has 0. All masses are 1 together.
    own = np.sqrt(HIDDEN) * (np.arange(VOCAB) == prompt[-1])
    coordinates = scores - scores[next(token for token in range(VOCAB) if token not in prompt)]
    found = (coordinates * ((own.sum() + GAIN) / coordinates.sum()) - own) / GAIN
    return found, [] if output.selection is None else output.selection[-1].selected


@pytest.mark.slow
def test_what_detection_finds_has_a_blunt_head_look_at_the_answer_by_the_published_factor(folder: Path) -> None:
    found = detect(models.load(folder, dtype="float32"), [item(seed) for seed in range(6)], 2)
    assert found.ranking("sum")[0] == found.ranking("ndcg10")[0] == SHARP
    heads = found.ranking("sum")[:1]
    llm = LLM(folder, dtype="float32", block_size=8, max_num_seqs=1, max_model_len=64)
    for seed, strength in enumerate((2.0, 2.5, 8.0, 0.5)):
        (one,) = [item(100 + seed)]
        prompt, answer = one.tokens, one.tokens[-1] - 8
        plain, _ = masses(llm, prompt, None)
        assert plain.sum() == pytest.approx(1, abs=1e-6)
        assert plain[answer] < 0.1  # blunt: an even share would be 1 / 43
        dysco = DyscoParams(
            heads=heads, top_p=None, top_k=1, strength=strength, observe=0, tail=1, return_selection=True
        )
        raised, selected = masses(llm, prompt, dysco)
        assert selected == [prompt.index(answer)]
        whole = plain[answer] + plain[prompt[-1]]  # the token itself is raised, too; both are in the prompt once
        rest = 1 + (strength - 1) * whole
        want = plain / rest
        want[[answer, prompt[-1]]] *= strength
        np.testing.assert_allclose(raised, want, atol=1e-6)
        assert raised[answer] / plain[answer] == pytest.approx(strength / rest, rel=3e-5)
